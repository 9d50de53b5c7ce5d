"""Cross-entropy with the labels, for batches of which only a part is labelled."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features
from distill.heads.base import Batch, Head, mean_over_ranks


class CrossEntropy(Head):
    """Cross-entropy between the labels and the student, mean over the labelled samples of all ranks.

    A label is a class, int64 `[B]`, or a soft label `[B, K]`. A sample with the class -1 or with a soft label of zeros
    is unlabelled and takes no part; a soft label counts by the sum of its row. Without any label the loss is 0.

    Args:
        label_smoothing: the share of each label that is spread evenly over all classes.

    Raises:
        UserError: a label smoothing outside [0, 1).
    """

    needs = frozenset({"logits"})
    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be at least 0 and below 1, given {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with labels `[B]` or `[B, K]`."""
        logits, label = student["logits"], batch["label"]
        if label.ndim == 1:
            total = F.cross_entropy(
                logits, label, ignore_index=-1, reduction="sum", label_smoothing=self.label_smoothing
            )
            return mean_over_ranks(total, (label != -1).sum())
        label = label.to(logits.dtype)
        mass = label.sum(dim=-1, keepdim=True)
        # torch's own smoothing would give a row of zeros the mass that it lacks
        smoothed = label.lerp(mass / label.shape[-1], self.label_smoothing)
        return mean_over_ranks(F.cross_entropy(logits, smoothed, reduction="sum"), mass.sum())
