"""The loss that the CRD benchmark calls correlation congruence."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from distill.distributed import gather
from distill.errors import require_at_least
from distill.features import Features, FeatureSpec
from distill.functional import adjacent_congruence
from distill.heads.base import Batch, Head, RunInfo, Scope, require_several_images
from distill.heads.parts.projection import CastLinear


class RepDistillerCC(Head):
    """Each image's deviation from the teacher times that of the next image: mean_i sum_c |s - t|_ic |s - t|_(i+1)c.

    It reproduces the row CC of the CRD benchmark, where its weight is 0.02; the paper's loss is `CC`. Unlike a relation
    it depends on the order of the batch. Both projections are learned, as in the benchmark, so it is also 0 if both map
    everything to one point.

    Args:
        width: d of the projections; 128 as in the benchmark.
        of: the features that are compared, flattened: `embedding`, `logits`, `tokens` or the name of a tap.

    Raises:
        UserError: a width below 1.
    """

    scope: Scope = "global"
    student_projection: nn.Module
    teacher_projection: nn.Module

    def __init__(self, width: int = 128, of: str = "embedding") -> None:
        super().__init__()
        require_at_least(1, width=width)
        self.width, self.of = width, of
        self.needs = frozenset({of})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the projections."""
        self.student_projection = CastLinear(prod(student[self.of]), self.width)
        self.teacher_projection = CastLinear(prod(teacher[self.of]), self.width)

    def prepare(self, run: RunInfo) -> None:
        """Check that there are images to compare with each other.

        Raises:
            UserError: a batch may have only one image.
        """
        super().prepare(run)
        require_several_images(self, run)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the projected features over the batches of all ranks, in the order in which they were dealt."""
        projected = self.student_projection(student[self.of].flatten(1))
        target = self.teacher_projection(teacher[self.of].flatten(1))
        return adjacent_congruence(gather(projected), gather(target))
