"""Normalized knowledge distillation (Yang, Zeng, Li, Zhang, Yuan, Li, 2023)."""

from __future__ import annotations

from torch import Tensor

from distill import functional
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch, LogitHead
from distill.heads.parts.labeled import mean_over_labeled, require_other_classes
from distill.schedules import Number, require_values_above, value_at


class NKD(LogitHead):
    """Cross-entropy with the teacher on the target class, and with its normalized probabilities on all others.

    With p the class probabilities at temperature 1, y the label, and q the probabilities at temperature T among the
    classes other than y, normalized to sum 1, the loss is the mean over the samples of::

        -p_t(y) log p_s(y) - gamma T^2 sum_{c != y} q_t(c) log q_s(c)

    These are cross-entropies: the value is not 0 for equal networks. The task has the weight 1 beside it. The authors'
    values are 1.5 and T 1 for ImageNet, 3.5 and T 3 for CIFAR-100 with ResNet-34 and ResNet-18; on the pairs of the
    CRD benchmark, 1.5 and T 1 are others' (CRLD's code).

    Labels are read. The target of a soft label `[B, K]` is its largest class (the first of equals). A sample without a
    label (-1, or a soft label of zeros) is ignored: the mean runs over the labeled samples of all ranks, and is 0 if
    there are none.

    Args:
        gamma: weight of the classes other than the target.
        temperature: T, a number or a schedule; the target's part has none.

    Raises:
        UserError: a temperature not above 0.
    """

    batch_needs = frozenset({"label"})

    def __init__(self, gamma: float = 1.5, temperature: Number = 1.0) -> None:
        super().__init__()
        self.gamma = gamma
        require_values_above(0, temperature=temperature)
        self.temperature = temperature

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Check the numbers of classes.

        Raises:
            UserError: they differ, or there is only one class.
        """
        super().build(student, teacher)
        require_other_classes(self, student)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare logits `[B, K]` with logits `[B, K]`, given labels `[B]` or `[B, K]`."""
        logits = student["logits"], teacher["logits"]
        temperature = value_at(self.temperature, self.progress)
        return mean_over_labeled(
            lambda target: functional.nkd(*logits, target, self.gamma, temperature), batch["label"]
        )
