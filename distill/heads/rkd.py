"""Relational knowledge distillation (Park, Kim, Lu, Cho, 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.distributed import Rows
from distill.errors import UserError
from distill.functional import (
    angle_difference,
    centered_gram,
    divided_by_mean,
    edges_of,
    huber,
    normalized_distances,
    row_distances,
)
from distill.heads.base import Scope
from distill.heads.parts.feature_relation import FeatureRelation


class RKD(FeatureRelation):
    """Distances between pairs and angles in triples of images, each compared by the Huber loss.

    Distances are divided by their mean over the non-zero pairs. The means run over all L^2 pairs and L^3 triples,
    degenerate ones included as zeros, so that values agree with the public codes for embeddings that all differ. Two
    equal embeddings have distance 0 here and do not count in the mean distance; the public codes give them distance
    1e-6 and count them. Memory grows with L^2, and time with L^3 unless `angle` is 0. Of W ranks, each computes the
    distances of its own images to all, and the angles at its own images: a W-th of this time, but for the Gram matrix
    of all images, which the angles need on every rank.

    Args:
        distance: weight of the distances; 25 as in the CRD benchmark.
        angle: weight of the angles; 50 as in the CRD benchmark.
        of: the features that are related: `embedding`, `logits`, `tokens` or the name of a tap.
        scope: `global` and `batch` relate images, each as one vector; `image` relates the tokens of each image.

    Raises:
        UserError: both weights are 0, or an unsupported scope.
    """

    def __init__(
        self, distance: float = 25.0, angle: float = 50.0, of: str = "embedding", scope: Scope = "global"
    ) -> None:
        super().__init__(of, scope)
        self.distance, self.angle = distance, angle
        if distance == 0 and angle == 0:
            raise UserError("RKD compares nothing with distance 0 and angle 0: give at least one of them a weight")

    def relate_rows(self, tokens: Tensor, rows: Rows) -> list[Any]:
        """Return the rows of the distances, `[..., R, L]`, and the edges that span the angles at as many vertices.

        Those of weight 0 are left out.
        """
        if self.angle == 0:
            return [normalized_distances(tokens, rows=rows)]
        gram = centered_gram(tokens)
        distances = row_distances(gram, rows=rows)
        angles = edges_of(gram, distances, rows)
        return [angles] if self.distance == 0 else [divided_by_mean(distances, rows), angles]

    def compare(self, student_relation: list[Any], teacher_relation: list[Any]) -> Tensor:
        """Return the weighted sum of the Huber losses."""
        losses = []
        if self.distance != 0:
            losses.append(self.distance * huber(student_relation[0], teacher_relation[0]))
        if self.angle != 0:
            losses.append(self.angle * angle_difference(student_relation[-1], teacher_relation[-1]))
        return torch.stack(losses).sum()
