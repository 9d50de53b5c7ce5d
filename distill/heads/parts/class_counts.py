"""The base of losses that use the number of training images per class."""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import FeatureSpec
from distill.heads.base import Head, RunInfo


class ClassCountsHead(Head, ABC):
    """A loss on labels that uses `counts`, the number of training images per class; for `model.task.head`.

    Until `prepare` sets them, all classes count as equally frequent.

    Attributes:
        counts: int64 `[K]`, saved in checkpoints; integers, which no change of the module's type rounds.
    """

    needs = frozenset({"logits"})
    needs_teacher = False
    batch_needs = frozenset({"label"})
    counts: Tensor

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Register the counts."""
        self.register_buffer("counts", torch.ones(student["logits"], dtype=torch.int64))

    def prepare(self, run: RunInfo) -> None:
        """Store the number of training images per class.

        Raises:
            UserError: the data do not provide it, the number of classes differs, or a class has no image.
        """
        if run.class_counts is None:
            raise UserError(
                f"{type(self).__name__} needs to know how many training images each class has, but the data have no "
                "class_counts(): give a data module of distill.data"
            )
        counts = run.class_counts()
        if counts.shape != self.counts.shape:
            raise UserError(
                f"{type(self).__name__} was built for {len(self.counts)} classes, but the data have {len(counts)}"
            )
        if (counts < 1).any():
            empty = int(counts.argmin())
            raise UserError(
                f"{type(self).__name__} needs a labeled training image of every class, class {empty} has none"
            )
        self.counts.copy_(counts)
