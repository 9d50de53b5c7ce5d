"""Metrics of the agreement of a student with its teacher."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distill.metrics.full_precision import FullPrecision


class _SampleMean(FullPrecision):
    """Mean over samples of a function of student and teacher logits."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor, counted: Tensor) -> None:
        """Add logits `[B, K]` of both; `counted` `[B]` is true for the samples that count."""
        values = self.per_sample(student, teacher)
        self.total += torch.where(counted, values, 0.0).sum()
        self.count += counted.sum()

    def compute(self) -> Tensor:
        """Return the mean over all counted samples."""
        return (self.total / self.count).float()

    @abstractmethod
    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the value of each sample, `[B]`."""


class Agreement(_SampleMean):
    """Fraction of samples for which student and teacher predict the same class, in `[0, 1]`."""

    higher_is_better = True

    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return 1 if the two agree, else 0."""
        return (student.argmax(dim=1) == teacher.argmax(dim=1)).float()


class TeacherDivergence(_SampleMean):
    """Mean KL(teacher || student) of the class probabilities at temperature 1, in nats."""

    higher_is_better = False

    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return KL(teacher || student) of each sample."""
        log_student, log_teacher = (functional.log_softmax(logits.float(), dim=1) for logits in (student, teacher))
        return functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
