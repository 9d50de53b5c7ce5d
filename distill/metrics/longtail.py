"""Accuracy by class frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.metrics.classification import IGNORE_INDEX
from distill.metrics.full_precision import FullPrecision


class LongTailAccuracy(FullPrecision):
    """Recall of every class, and its mean over groups of classes, in `[0, 1]`.

    Updated with logits `[B, K]` and labels `[B]`; labels equal to `IGNORE_INDEX` do not count. On a balanced test set
    the mean recall of a group is the accuracy on its images. Classes without a test image are left out of every mean.

    Args:
        num_classes: K.
        groups: group name -> classes; an empty group is not reported.
    """

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    images: Tensor

    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        for name in ("hits", "images"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.groups = {name: list(classes) for name, classes in groups.items() if classes}

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add logits `[B, K]` and labels `[B]`."""
        kind = label.clamp_min(0)
        self.images = self.images.index_add(0, kind, (label != IGNORE_INDEX).long())
        self.hits = self.hits.index_add(0, kind, (logits.argmax(dim=1) == label).long())

    def compute(self) -> dict[str, Tensor]:
        """Return `balanced` (balanced accuracy), the mean of each group, and `recall/<class>`; NaN without images."""
        recall = self.hits / self.images
        means = {"balanced": recall.nanmean()}
        means |= {name: recall[classes].nanmean() for name, classes in self.groups.items()}
        return means | {f"recall/{label}": value for label, value in enumerate(recall)}
