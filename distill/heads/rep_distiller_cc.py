"""What the CRD benchmark calls correlation congruence."""

from __future__ import annotations

from math import prod
from typing import ClassVar

from torch import Tensor, nn

from distill.distributed import gather
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import adjacent_congruence
from distill.heads.base import Batch, Head, Scope
from distill.heads.parts.projection import CastLinear


class RepDistillerCC(Head):
    """Each image's deviation from the teacher times that of the next image: mean_i sum_c |s - t|_ic |s - t|_(i+1)c.

    It is here to reproduce the row CC of the CRD benchmark, which gives it the weight 0.02; the paper's loss is `CC`.
    It depends on the order of the batch, as no relation does. Both projections are learned, as in the benchmark, so
    it is also 0 where both map to one point.

    Args:
        width: d of the projections; 128 as in the benchmark.
        of: the features that are compared, flattened: `embedding`, `logits`, `tokens` or the name of a tap.

    Raises:
        UserError: a width below 1.
    """

    ordered: ClassVar[bool] = True
    scope: Scope = "global"
    student_projection: nn.Module
    teacher_projection: nn.Module

    def __init__(self, width: int = 128, of: str = "embedding") -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"width must be at least 1, given {width}")
        self.width, self.of = width, of
        self.needs = frozenset({of})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make the projections."""
        self.student_projection = CastLinear(prod(student[self.of]), self.width)
        self.teacher_projection = CastLinear(prod(teacher[self.of]), self.width)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the projected features over the batches of all ranks, in rank order."""
        own = self.student_projection(student[self.of].flatten(1))
        other = self.teacher_projection(teacher[self.of].flatten(1))
        return adjacent_congruence(gather(own), gather(other))
