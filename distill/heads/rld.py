"""Refined logit distillation (Sun, Chen, Lyu, Chen, Chen, Wang, 2025)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.labeled import mean_over_labeled, require_other_classes
from distill.heads.parts.softened_logits import SoftenedLogitHead
from distill.heads.parts.temperature import Temperature
from distill.schedules import Number, require_values_above, value_at


class RLD(SoftenedLogitHead):
    """`alpha` SCD + `beta` MCD: the teacher's confidence, and its order of the classes below the label.

    Sample confidence distillation is T_c^2 KL from {max p_t, 1 - max p_t} to {p_s(y), 1 - p_s(y)}, whichever class the
    teacher's largest is. Masked correlation distillation is T^2 KL among the classes to which the teacher gives less
    than to the label y; a sample where it gives less to none has value and gradient 0. So a wrong teacher teaches no
    wrong order.

    Labels are read. The target of a soft label `[B, K]` is its largest class (the first of equals). A sample without a
    label (-1, or a soft label of zeros) is ignored: the mean runs over the labeled samples of all ranks, and is 0 if
    there are none.

    The task has the weight 1 beside it, and the loss is warmed up over 20 epochs: give its term the weight
    `Warmup(epochs=20)`, which grows with every step (in the authors' code it is constant within an epoch). For
    ImageNet T is 1, `beta` 2, and the warm-up 1 epoch. With standardized logits, both temperatures are 2, and `alpha`
    and `beta` nine times as large, in the authors' code.

    Args:
        alpha: weight of SCD; 1 as in the authors' code.
        beta: weight of MCD; 8 as in the authors' code.
        temperature: T, a number, a schedule or a learned temperature; 4 as in the authors' code.
        confidence_temperature: T_c, a number or a schedule; 1 as in the authors' code. `null` is T, as in the command
            of its README.
        standardize: whether each sample's logits are standardized before T and T_c, in both networks.

    Raises:
        UserError: a temperature not above 0.
    """

    batch_needs = frozenset({"label"})

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: Temperature = 4.0,
        confidence_temperature: Number | None = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.soften(temperature, standardize)
        require_values_above(0, confidence_temperature=confidence_temperature)
        self.confidence_temperature = confidence_temperature

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
        given = self.confidence_temperature
        confidence = temperature if given is None else value_at(given, self.progress)
        return mean_over_labeled(
            lambda target: functional.rld(*logits, target, self.alpha, self.beta, temperature, confidence),
            batch["label"],
        )
