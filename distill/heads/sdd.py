"""Scale decoupled distillation: SDD (Wei, Luo, Luo, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from distill import functional
from distill.errors import UserError, one_of, require_at_least
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch, LogitHead
from distill.heads.parts.classifier import MapClassifierHead, region_scores
from distill.heads.parts.labeled import mean_over_labeled, require_other_classes
from distill.schedules import Number, require_values_above, value_at

Loss = Callable[["SDD", Tensor, Tensor, Tensor, float], Tensor]

LOSSES: dict[str, Loss] = {
    "kd": lambda head, student, teacher, target, temperature: functional.kd(student, teacher, temperature),
    "dkd": lambda head, student, teacher, target, temperature: functional.dkd(
        student, teacher, target, head.alpha, head.beta, temperature
    ),
    "nkd": lambda head, student, teacher, target, temperature: functional.nkd(
        student, teacher, target, head.beta, temperature, head.keep_target
    ),
}
"""Losses of each region, `[B, N]`, by name."""


class SDD(MapClassifierHead, LogitHead):
    """A loss on logits for each region of the image: KD, DKD or NKD on the scores of pooled parts of the last map.

    The map is pooled to 4 x 4 cells, and these to 2 x 2 and to 1; each network classifies the mean of each of the N
    regions with its own classifier. Regions where the teacher is right and for the whole image (the 1 x 1 region)
    wrong, or the other way round, have the weight `complementary`, all others 1. The loss is the sum over the regions,
    divided by N as in the authors' code (the paper's text does not divide), mean over the samples. The gradient reaches
    the student's map and its classifier.

    The target of a soft label `[B, K]` is its largest class. A sample without a label (-1, or a soft label of zeros) is
    ignored: the mean runs over the labeled samples of all ranks, and is 0 if there are none.

    The authors' code gives SD-KD the weight 0.9 and the task 0.1, and SD-DKD the weight 1 and a warm-up over 20 epochs
    (30 in the paper). If a region's loss is NaN, it sets it to 0; here logits of any size give a finite loss.

    Args:
        loss: `kd`, `dkd` or `nkd`.
        of: the layer that the embedding is the mean of: `tokens`, or the name of a tap.
        scales: cells per side of each grid of regions, 1 among them; `[1, 2]` in the authors' scripts for networks of
            one architecture, `[1, 2, 4]` for others.
        temperature: T, a number or a schedule; 4 as there.
        alpha: weight of DKD's target-class part.
        beta: weight of the other classes in DKD and NKD; 8 as there for most pairs, 2 or 6 for those of DKD.
        complementary: weight of the regions on which the teacher's answer differs in being right; 2 as there.
        keep_target: whether NKD's second part ranges over all classes, as in the code that gave the published figures;
            `False` leaves the target out, as NKD's own authors do.

    Raises:
        UserError: an unknown loss, scales without 1, or a number out of its range.
    """

    batch_needs = frozenset({"label"})
    alpha: float
    beta: float
    keep_target: bool

    def __init__(
        self,
        loss: Literal["kd", "dkd", "nkd"] = "kd",
        of: str = "tokens",
        scales: Sequence[int] = (1, 2, 4),
        temperature: Number = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        complementary: float = 2.0,
        keep_target: bool = True,
    ) -> None:
        super().__init__(of)
        self.loss = one_of("loss", loss, LOSSES)
        if 1 not in scales or min(scales) < 1 or len(set(scales)) < len(scales):
            raise UserError(f"scales must be different numbers of cells, with 1 among them, given {list(scales)}")
        self.scales = sorted(scales)  # the whole image first
        require_values_above(0, temperature=temperature)
        require_at_least(0, complementary=complementary)
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.complementary, self.keep_target = complementary, keep_target

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of the layer, and check the numbers of classes.

        Raises:
            UserError: they differ, there is only one class, or the layer is not the classifier's.
        """
        super().build(student, teacher)
        require_other_classes(self, student)

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the teacher's scores of the regions, `[B, N, K]`."""
        return Features(maps={"regions": region_scores(teacher, self.teacher_map, *self.scales)})

    def summary_key(self) -> Mapping[str, Any]:
        """Return the layer and the regions."""
        return {"of": self.of, "scales": self.scales}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the scores of the student's regions with the teacher's, given labels `[B]` or `[B, K]`."""
        scores, expected = region_scores(student, self.student_map, *self.scales), teacher["regions"]
        temperature = value_at(self.temperature, self.progress)

        def loss(target: Tensor) -> Tensor:
            of_region = target.unsqueeze(1).expand(expected.shape[:2])
            losses = LOSSES[self.loss](self, scores, expected, of_region, temperature)
            return (losses * functional.region_weights(expected, target, self.complementary)).mean(dim=1)

        return mean_over_labeled(loss, batch["label"])
