"""Relational knowledge distillation (Park, Kim, Lu, Cho, 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import angle_cosines, huber, normalised_distances
from distill.heads.base import Batch, RelationHead, Scope


class RKD(RelationHead):
    """Distances between pairs and angles in triples of images, each compared by the Huber loss.

    Distances are divided by their mean over the non-zero pairs. The means run over all L^2 pairs and L^3 triples,
    degenerate ones included as zeros, so that values compare with the public codes. Memory grows with L^3 as long as
    `angle` is not 0.

    Args:
        distance: weight of the distances; 25 as in the CRD benchmark.
        angle: weight of the angles; 50 as in the CRD benchmark.
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: both weights are 0, or there is no such scope.
    """

    def __init__(
        self, distance: float = 25.0, angle: float = 50.0, of: str = "embedding", scope: Scope = "global"
    ) -> None:
        super().__init__(scope)
        self.relations = [
            (weight, relation)
            for weight, relation in ((distance, normalised_distances), (angle, angle_cosines))
            if weight != 0
        ]
        if not self.relations:
            raise UserError("RKD compares nothing with distance 0 and angle 0: give at least one of them a weight")
        self.of = of
        self.needs = frozenset({of})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Hold the shapes against the scope; there is nothing to make.

        Raises:
            UserError: scope `image` without tokens, or with different numbers of them.
        """
        shapes = student[self.of], teacher[self.of]
        if self.scope == "image" and (len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][0]):
            raise UserError(
                f"RKD at scope 'image' needs equally many tokens of both networks, but {self.of!r} has the shape "
                f"{shapes[0]} in the student and {shapes[1]} in the teacher"
            )

    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """One vector an image, `[B, d]`, or its tokens, `[B, N, d]`, at scope `image`."""
        found = features[self.of]
        return found if self.scope == "image" else found.flatten(1)

    def relate(self, tokens: Tensor) -> list[Tensor]:
        """Distances `[..., L, L]` and cosines `[..., L, L, L]`, those whose weight is not 0."""
        return [relation(tokens) for _, relation in self.relations]

    def compare(self, student_relation: list[Tensor], teacher_relation: list[Tensor]) -> Tensor:
        """The weighted sum of the Huber losses."""
        losses = [
            weight * huber(student, teacher)
            for (weight, _), student, teacher in zip(self.relations, student_relation, teacher_relation, strict=True)
        ]
        return torch.stack(losses).sum()
