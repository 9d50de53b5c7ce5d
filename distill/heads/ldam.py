"""Label-distribution-aware margins (Cao et al. 2019): the rarer the class, the wider its margin."""

from __future__ import annotations

from torch import Tensor

from distill.errors import UserError, require_above, require_at_least, require_between
from distill.features import Features
from distill.functional import effective_number_weights, label_margins, with_margins
from distill.heads.base import Batch, RunInfo
from distill.heads.cross_entropy import labeled_cross_entropy
from distill.heads.parts.class_counts import ClassCountsHead


class LDAM(ClassCountsHead):
    """Label-distribution-aware margins, with deferred re-weighting of the classes (LDAM-DRW).

    Cross-entropy of s (z_y - Delta_y) against s z_c, where the margin Delta_c falls with n_c^(1/4). From a given share
    of the run on, samples are weighted by class with (1 - beta) / (1 - beta^n_c), normalized to mean 1 over the
    classes, and the loss is the weighted mean. Labels may be soft or missing as in `CrossEntropy`; each class of a soft
    label gets its share of its margin.

    The published code uses logits that are cosines, from a classifier without a bias whose weights and inputs have
    length 1; the defaults 30 and 0.5 are meant for these. On a plain linear classifier, a scale of 30 makes the loss,
    and the steps of an optimizer that depend on the size of the gradient, thirty times as large: use a smaller scale
    with SGD.

    Args:
        margin: Delta of the rarest class, before the scale.
        scale: s.
        beta: of the re-weighting.
        reweight_from: the share of the run after which classes are re-weighted; the published code's epoch 160 of 200
            is 0.8. `null` turns re-weighting off.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(
        self, margin: float = 0.5, scale: float = 30.0, beta: float = 0.9999, reweight_from: float | None = 0.8
    ) -> None:
        super().__init__()
        require_at_least(0, margin=margin)
        require_above(0, scale=scale)
        if not 0 <= beta < 1:
            raise UserError(f"beta must be at least 0 and below 1, given {beta}")
        require_between(0, 1, reweight_from=reweight_from)
        self.margin, self.scale, self.beta, self.reweight_from = margin, scale, beta, reweight_from

    def prepare(self, run: RunInfo) -> None:
        """Store the number of training images per class.

        Raises:
            UserError: the counts do not fit, or `reweight_from` is given in a run without an end.
        """
        super().prepare(run)
        if self.reweight_from is not None and run.progress.steps is None:
            raise UserError(
                f"reweight_from is a share of the run, {self.reweight_from}, but the run has no end: give max_epochs, "
                "or null"
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with labels `[B]` or `[B, K]`."""
        logits, label = student["logits"], batch["label"]
        counts = self.counts.to(logits.dtype)
        weights = effective_number_weights(counts, self.beta) if self._reweights else None
        logits = with_margins(logits, label, label_margins(counts, self.margin), self.scale)
        return labeled_cross_entropy(logits, label, weights=weights)

    @property
    def _reweights(self) -> bool:
        steps = self.progress.steps
        return self.reweight_from is not None and steps is not None and self.progress.step >= self.reweight_from * steps
