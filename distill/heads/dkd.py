"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, 2022)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch, LogitHead, mean_over_ranks
from distill.schedules import Number, require_values_above, value_at


class DKD(LogitHead):
    """`alpha` TCKD + `beta` NCKD: the target class against the rest, and the rest among themselves.

    Labels are read. The target of a soft label `[B, K]` is its largest class (the first of equals). A sample without a
    label (-1, or a soft label of zeros) is ignored: the mean runs over the labeled samples of all ranks, and is 0 if
    there are none.

    The public recipe warms the loss up over 20 epochs: give its term the weight `Warmup(epochs=20)`, which grows with
    every step. (There the factor is constant within an epoch, from 1/20 in the first on.)

    Args:
        alpha: weight of the target-class part; 1 in all public recipes.
        beta: weight of the other classes. The public values for CIFAR-100 depend on the pair of networks: 2 for
            ResNet-56 and 110 with ResNet-20 and 32, 6 for VGG-13 with VGG-8 and MobileNetV2 and for WRN-40-2 with
            WRN-16-2 and WRN-40-1, 8 for the others.
        temperature: T, a number or a schedule; 4 as in the CRD benchmark.

    Raises:
        UserError: a temperature not above 0.
    """

    batch_needs = frozenset({"label"})

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: Number = 4.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        require_values_above(0, temperature=temperature)
        self.temperature = temperature

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check the numbers of classes.

        Raises:
            UserError: they differ, or there is only one class.
        """
        super().build(student, teacher)
        if student["logits"] == (1,):
            raise UserError("DKD sets a class against the others, but the networks have 1 class: it needs 2 or more")

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`, given labels `[B]` or `[B, K]`."""
        label = batch["label"]
        labeled, target = (label.sum(dim=-1) > 0, label.argmax(dim=-1)) if label.ndim == 2 else (label != -1, label)
        loss = functional.dkd(
            student["logits"],
            teacher["logits"],
            target.masked_fill(~labeled, 0),
            self.alpha,
            self.beta,
            value_at(self.temperature, self.progress),
        )
        return mean_over_ranks((loss * labeled).sum(), labeled.sum())
