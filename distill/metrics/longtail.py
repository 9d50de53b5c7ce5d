"""Accuracy by class frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from distill.metrics.collection import IGNORE_INDEX


class LongTailAccuracy(MulticlassStatScores):
    """Recall of every class, and its mean over groups of classes, in `[0, 1]`.

    Updated with logits `[B, K]` and labels `[B]`; labels equal to `IGNORE_INDEX` do not count. On a balanced test set
    the mean recall of a group is the accuracy on its images. Classes without a test image are left out of every mean.

    Args:
        num_classes: K.
        groups: group name -> classes; an empty group is not reported.
    """

    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]]) -> None:
        super().__init__(num_classes, average="none", ignore_index=IGNORE_INDEX, validate_args=False)
        self.groups = {name: list(classes) for name, classes in groups.items() if classes}

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # a dict of means instead of the counts
        """Return `balanced` (balanced accuracy), the mean of each group, and `recall/<class>`; NaN without images."""
        true_positive, _, _, _, support = super().compute().unbind(-1)
        recall = true_positive / support
        means = {"balanced": recall.nanmean()}
        means |= {name: recall[classes].nanmean() for name, classes in self.groups.items()}
        return means | {f"recall/{label}": value for label, value in enumerate(recall)}
