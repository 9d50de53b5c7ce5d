"""Knowledge distillation (Hinton, Vinyals, Dean, 2015)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.features import Features
from distill.heads.base import Batch, LogitHead
from distill.schedules import Number, require_values_above, value_at


class KD(LogitHead):
    """T^2 KL(teacher || student) of the softened class distributions, mean over the samples.

    Labels are not read. The CRD benchmark gives the term the weight 0.9 and the task 0.1.

    Args:
        temperature: T, a number or a schedule; 4 as in the CRD benchmark.

    Raises:
        UserError: a temperature not above 0.
    """

    def __init__(self, temperature: Number = 4.0) -> None:
        super().__init__()
        require_values_above(0, temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`."""
        temperature = value_at(self.temperature, self.progress)
        return functional.kd(student["logits"], teacher["logits"], temperature).mean()
