"""Cross-entropy with labels, for batches that may be labeled in part only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.distributed import mean_over_ranks
from distill.errors import UserError
from distill.features import Features
from distill.heads.base import Batch, Head


class CrossEntropy(Head):
    """Cross-entropy between the labels and the student, mean over the labeled samples of all ranks.

    Labels are classes, int64 `[B]`, or soft labels `[B, K]`. A sample with class -1 or a soft label of zeros is
    unlabeled and ignored; a soft label is weighted by the sum of its row. Without any label the loss is 0.

    Args:
        label_smoothing: the share of each label that is distributed evenly over all classes.

    Raises:
        UserError: a label smoothing outside [0, 1).
    """

    needs = frozenset({"logits"})
    needs_teacher = False
    batch_needs = frozenset({"label"})

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be at least 0 and below 1, given {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with labels `[B]` or `[B, K]`."""
        return labeled_cross_entropy(student["logits"], batch["label"], self.label_smoothing)


def labeled_cross_entropy(
    logits: Tensor, label: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Return this rank's share of the cross-entropy, a (weighted) mean over the labeled samples of all ranks.

    Args:
        logits: `[B, K]`.
        label: classes, int64 `[B]`, -1 for unlabeled; or soft labels `[B, K]`, weighted by the sums of their rows.
        label_smoothing: the share of each label that is distributed evenly over all classes.
        weights: of the classes, `[K]`; 1 by default.

    Returns:
        A scalar (see `mean_over_ranks`), 0 without any label.
    """
    if label.ndim == 1:
        total = F.cross_entropy(
            logits, label, weights, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
        )
        labeled = label != -1
        return mean_over_ranks(total, (labeled if weights is None else labeled * weights[label.clamp_min(0)]).sum())
    label = label.to(logits.dtype)
    mass = label.sum(dim=-1, keepdim=True)
    # torch's smoothing would give mass to a row of zeros
    smoothed = label.lerp(mass / label.shape[-1], label_smoothing)
    total = F.cross_entropy(logits, smoothed, weights, reduction="sum")
    return mean_over_ranks(total, (mass if weights is None else label * weights).sum())
