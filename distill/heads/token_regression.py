"""Regression of the teacher's tokens."""

from __future__ import annotations

from torch import Tensor

from distill.features import Features, FeatureSpec
from distill.functional import resize
from distill.heads.base import Batch, Head
from distill.heads.parts.map_reader import MapReader
from distill.heads.parts.projector import Distance, Projector, Regressor, require_regression


class TokenRegression(Head):
    """Distance between the teacher's tokens and those that a projector predicts from the student's.

    The student's projected tokens are interpolated bilinearly to the teacher's grid, finer or coarser, so that every
    token of the teacher has a prediction. With `distance: mse` and weight 1 this is the second version of the
    distillation of LightlyTrain, which predicts the last two blocks of a ViT at once, mixes the images by mixup and
    initializes the projector's weights with a standard deviation of 0.02; here the tokens are those after the last
    block, mixing is up to `data.mixing`, and the projector begins with torch's default weights.

    Args:
        of: `tokens`, or the name of a tap.
        distance: `mse`, the mean squared difference of the tokens as they are, or `cosine`, the mean of 1 - cos, which
            ignores their lengths.
        projector: `linear` is a linear map with bias, `mlp` two of them with a GELU between, `identity` none, which
            requires equal widths.

    Raises:
        UserError: an unknown distance or projector.
    """

    def __init__(self, of: str = "tokens", distance: Distance = "mse", projector: Projector = "linear") -> None:
        super().__init__()
        require_regression(distance, projector)
        self.of = of
        self.needs = frozenset({of})
        self.distance: Distance = distance
        self.projector: Projector = projector

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projector.

        Raises:
            UserError: the layer is neither a map nor a token grid, or the projector is `identity` and the widths
                differ.
        """
        self.readers = (
            MapReader(self.of, student, "student", vectors=False),
            MapReader(self.of, teacher, "teacher", vectors=False),
        )
        width, target = (reader.width for reader in self.readers)
        self.regressor = Regressor(self.distance, self.projector, width, target, self.of)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the tokens `[B, N_s, d_s]`, projected and on the teacher's grid, and `[B, N_t, d_t]`."""
        (read_student, read_teacher), regressor = self.readers, self.regressor
        target = read_teacher(teacher)
        predicted = regressor.project(read_student(student).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        predicted = resize(predicted, (target.shape[-2], target.shape[-1]))
        return regressor.distance(predicted.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1))
