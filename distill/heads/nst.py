"""Neuron selectivity transfer (Huang, Wang, 2017)."""

from __future__ import annotations

from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import channel_discrepancy
from distill.heads.base import Batch, Head, Scope
from distill.heads.grid_tokens import GridTokens, averaged


class NST(Head):
    """Where the channels of an image fire: MMD^2 of both networks' channels with the kernel (x . y)^2, mean over B.

    A channel is the vector of its activations over the cells, at length 1. The two networks may have any channels;
    where their grids differ, the larger one is averaged to the smaller.

    The CRD benchmark takes the sum over all stages with weight 50: give one term for each stage.

    Args:
        of: the features whose channels are compared: `tokens`, or a tap whose output is a token grid or a map.
    """

    scope: Scope = "image"

    def __init__(self, of: str = "tokens") -> None:
        super().__init__()
        self.of = of
        self.needs = frozenset({of})

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Find how each network's cells are read, and the grid that both are brought to.

        Raises:
            UserError: a network gives no token grid, or the common one has a single cell.
        """
        self.student_grid = GridTokens(self.of, student, "student", "average", stride=1)
        self.teacher_grid = GridTokens(self.of, teacher, "teacher", "average", stride=1)
        grids = self.student_grid.grid, self.teacher_grid.grid
        self.common = min(grids[0][0], grids[1][0]), min(grids[0][1], grids[1][1])
        if self.common == (1, 1):
            raise UserError(
                f"NST compares where channels fire, but {self.of!r} has the grid {grids[0]} in the student and "
                f"{grids[1]} in the teacher: both need several cells in the same direction"
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the channels over the cells of the common grid."""
        own = averaged(self.student_grid(student), self.common)
        other = averaged(self.teacher_grid(teacher), self.common)
        return channel_discrepancy(own, other).mean()
