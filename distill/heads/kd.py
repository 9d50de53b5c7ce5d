"""Knowledge distillation (Hinton, Vinyals, Dean, 2015)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.features import Features
from distill.heads.base import Batch
from distill.heads.parts.softened_logits import SoftenedLogitHead
from distill.heads.parts.temperature import Temperature


class KD(SoftenedLogitHead):
    """T^2 KL(teacher || student) of the softened class distributions, mean over the samples.

    Labels are not read. The CRD benchmark gives the term the weight 0.9 and the task 0.1. With standardized logits
    (Sun, Ren, Li, Wang, Cao, 2024) the weight is 9 and T 2 in the authors' recipe for CIFAR-100; the task keeps 0.1.

    Args:
        temperature: T, a number, a schedule or a learned temperature; 4 as in the CRD benchmark.
        standardize: whether each sample's logits are standardized before T, in both networks.

    Raises:
        UserError: a temperature not above 0.
    """

    def __init__(self, temperature: Temperature = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.soften(temperature, standardize)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`."""
        return functional.kd(self.class_scores(student), self.class_scores(teacher), self.temperature_now()).mean()
