"""Class attention transfer: CAT-KD (Guo, Yan, Li, Lin, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill import functional
from distill.errors import require_at_least
from distill.features import Features
from distill.heads.base import Batch, LogitHead
from distill.heads.parts.classifier import MapClassifierHead, region_scores
from distill.heads.parts.map_reader import MapReader


class CATKD(MapClassifierHead, LogitHead):
    """Mean squared difference of both networks' class activation maps, pooled to `resolution` cells per side.

    A class activation map is the classifier applied to each cell of the last map, so that the mean over its cells is
    the logit; the bias is included. Labels are not read. Since pooling and classifier commute, the map is pooled first.
    The gradient reaches the student's map and its classifier.

    The authors' code for CIFAR-100 does not normalize; its weight depends on the pair: 15 for ResNet-32x4 with
    ResNet-8x4, 0.7 for ResNet-56 with ResNet-20, with resolution 2; 600 for ResNet-32x4 with the ShuffleNets, with
    resolution 4. "CAT" alone, without the task, normalizes, with weight 400. There the networks are rewritten to give
    the maps; here they stay as they are.

    Args:
        of: the layer that the embedding is the mean of: `tokens`, or the name of a tap.
        resolution: cells per side of the pooled maps; 2 as in the authors' code for most pairs.
        normalize: whether the map of each class is scaled to length 1 before the comparison.

    Raises:
        UserError: a resolution below 1.
    """

    def __init__(self, of: str = "tokens", resolution: int = 2, normalize: bool = False) -> None:
        super().__init__(of)
        require_at_least(1, resolution=resolution)
        self.resolution, self.normalize = resolution, normalize

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the teacher's pooled class activation maps, `[B, K, r, r]`."""
        return Features(maps={"activation": self._activation(teacher, self.teacher_map)})

    def summary_key(self) -> Mapping[str, Any]:
        """Return the layer and the resolution."""
        return {"of": self.of, "resolution": self.resolution}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the activation of the student's map `[B, d, h, w]` with the teacher's, `[B, K, r, r]`."""
        return functional.class_activation_difference(
            self._activation(student, self.student_map), teacher["activation"], self.resolution, self.normalize
        )

    def _activation(self, features: Features, read: MapReader) -> Tensor:
        scores = region_scores(features, read, self.resolution)
        return scores.mT.reshape(len(scores), -1, self.resolution, self.resolution)
