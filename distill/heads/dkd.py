"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, 2022)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.labeled import mean_over_labeled, require_other_classes
from distill.heads.parts.softened_logits import SoftenedLogitHead
from distill.heads.parts.temperature import Temperature


class DKD(SoftenedLogitHead):
    """`alpha` TCKD + `beta` NCKD: the target class against the rest, and the rest among themselves.

    Labels are read. The target of a soft label `[B, K]` is its largest class (the first of equals). A sample without a
    label (-1, or a soft label of zeros) is ignored: the mean runs over the labeled samples of all ranks, and is 0 if
    there are none.

    The public recipe warms the loss up over 20 epochs: give its term the weight `Warmup(epochs=20)`, which grows with
    every step. (There the factor is constant within an epoch, from 1/20 in the first on.)

    With standardized logits (Sun, Ren, Li, Wang, Cao, 2024) T is 2, and `alpha` and `beta` are nine times as large, in
    the authors' recipe for CIFAR-100.

    Args:
        alpha: weight of the target-class part; 1 in all public recipes.
        beta: weight of the other classes. The public values for CIFAR-100 depend on the pair of networks: 2 for
            ResNet-56 and 110 with ResNet-20 and 32, 6 for VGG-13 with VGG-8 and MobileNetV2 and for WRN-40-2 with
            WRN-16-2 and WRN-40-1, 8 for the others.
        temperature: T, a number, a schedule or a learned temperature; 4 as in the CRD benchmark.
        standardize: whether each sample's logits are standardized before T, in both networks.

    Raises:
        UserError: a temperature not above 0.
    """

    batch_needs = frozenset({"label"})

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: Temperature = 4.0, standardize: bool = False
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.soften(temperature, standardize)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check the numbers of classes.

        Raises:
            UserError: they differ, or there is only one class.
        """
        super().build(student, teacher)
        require_other_classes(self, student)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`, given labels `[B]` or `[B, K]`."""
        logits = self.class_scores(student), self.class_scores(teacher)
        temperature = self.temperature_now()
        return mean_over_labeled(
            lambda target: functional.dkd(*logits, target, self.alpha, self.beta, temperature), batch["label"]
        )
