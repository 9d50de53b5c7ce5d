"""Losses that set the class of each sample's label against the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distill.distributed import mean_over_ranks
from distill.errors import UserError
from distill.features import FeatureSpec
from distill.functional.labels import hard_labels
from distill.heads.base import Head


def mean_over_labeled(loss: Callable[[Tensor], Tensor], label: Tensor) -> Tensor:
    """Return this rank's share of the mean of a loss over the labeled samples of all ranks, 0 without any.

    Args:
        loss: takes the class of each sample, int64 `[B]`, and returns its loss, `[B]`; the class of an unlabeled sample
            is 0, and its loss is ignored.
        label: classes `[B]`, -1 for unlabeled; or soft labels `[B, K]`, whose class is the largest (the first of
            equals), rows of zeros for unlabeled.
    """
    target = hard_labels(label)
    labeled = target != -1
    return mean_over_ranks((loss(target.masked_fill(~labeled, 0)) * labeled).sum(), labeled.sum())


def require_other_classes(head: Head, spec: FeatureSpec) -> None:
    """Require two or more classes.

    Raises:
        UserError: there is only one.
    """
    if spec["logits"] == (1,):
        raise UserError(
            f"{type(head).__name__} sets a class against the others, but the networks have 1 class: it needs 2 or more"
        )
