"""Regression of the teacher's embedding."""

from __future__ import annotations

from torch import Tensor

from distill.features import Features, FeatureSpec
from distill.heads.base import Batch, Head
from distill.heads.parts.projector import Distance, Projector, Regressor, require_regression


class EmbeddingRegression(Head):
    """Distance between the teacher's embedding and the one that a projector predicts from the student's.

    With `distance: mse` and weight 1 this is the feature distillation of timm (`timm.task`), which projects only where
    the widths differ (`projector: identity` where they agree). The teacher's side is never projected: the target cannot
    collapse.

    Args:
        distance: `mse`, the mean squared difference of the embeddings as they are, or `cosine`, the mean of 1 - cos,
            which ignores their lengths.
        projector: `linear` is a linear map with bias, `mlp` two of them with a GELU between, `identity` none, which
            requires equal widths.

    Raises:
        UserError: an unknown distance or projector.
    """

    needs = frozenset({"embedding"})

    def __init__(self, distance: Distance = "mse", projector: Projector = "linear") -> None:
        super().__init__()
        require_regression(distance, projector)
        self.distance: Distance = distance
        self.projector: Projector = projector

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projector.

        Raises:
            UserError: the projector is `identity` and the widths differ.
        """
        (width,), (target,) = student["embedding"], teacher["embedding"]
        self.regressor = Regressor(self.distance, self.projector, width, target, "embedding")

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the embeddings `[B, d_s]`, projected, and `[B, d_t]`."""
        loss: Tensor = self.regressor(student["embedding"], teacher["embedding"])
        return loss
