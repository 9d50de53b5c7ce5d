"""Logit adjustment by class frequency (Menon et al. 2021; balanced softmax, Ren et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from distill.errors import UserError, require_at_least
from distill.features import Features
from distill.functional import log_priors
from distill.heads.base import Batch
from distill.heads.cross_entropy import labeled_cross_entropy
from distill.heads.parts.class_counts import ClassCountsHead


class LogitAdjustment(ClassCountsHead):
    """Cross-entropy of z_c + tau log pi_c, where pi are the classes' shares of the training images.

    In training, frequent classes get a head start that the network need not learn; a test uses the logits z unchanged.
    Temperature 1 is balanced softmax, 0 plain cross-entropy. Labels may be soft or missing as in `CrossEntropy`.

    Args:
        temperature: tau.
        label_smoothing: the share of each label that is distributed evenly over all classes.

    Raises:
        UserError: a temperature below 0, or a label smoothing outside [0, 1).
    """

    def __init__(self, temperature: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        require_at_least(0, temperature=temperature)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be at least 0 and below 1, given {label_smoothing}")
        self.temperature = temperature
        self.label_smoothing = label_smoothing

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with labels `[B]` or `[B, K]`."""
        logits = student["logits"]
        logits = logits + self.temperature * log_priors(self.counts.to(logits.dtype))
        return labeled_cross_entropy(logits, batch["label"], self.label_smoothing)
