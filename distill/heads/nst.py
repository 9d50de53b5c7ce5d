"""Neuron selectivity transfer (Huang, Wang, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import channel_discrepancy
from distill.heads.base import Batch, Head, Scope
from distill.heads.parts.grid_tokens import GridTokens, averaged
from distill.heads.parts.maps import layers_named, total


class NST(Head):
    """Where the channels of an image fire: MMD^2 of both networks' channels with the kernel (x . y)^2, mean over B.

    A channel is the vector of its activations over the cells, at length 1. The two networks may have any channels;
    where their grids differ, the larger one is averaged to the smaller. The loss is the sum over the layers.

    The CRD benchmark gave it all stages but the stem as layers, and the weight 50.

    Args:
        of: the layers whose channels are compared, one or several: `tokens`, taps whose output is a token grid or a
            map, or patterns of their names (`stage*`).

    Raises:
        UserError: no layer is given.
    """

    scope: Scope = "image"

    def __init__(self, of: Sequence[str] | str = "tokens") -> None:
        super().__init__()
        self.of = [of] if isinstance(of, str) else list(of)
        if not self.of:
            raise UserError("of must name one or more layers, given none")
        self.needs = frozenset(self.of)

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Find the layers that patterns stand for, and hold `needs` against what the networks give.

        Raises:
            UserError: a network gives no features of that name.
        """
        if teacher is not None:
            self.of = layers_named(self.of, student, teacher)
            self.needs = frozenset(self.of)
        super().check(student, teacher)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Find how each network's cells are read, and the grid that both are brought to.

        Raises:
            UserError: a network gives no token grid, or the common one has a single cell.
        """
        self.of = layers_named(self.of, student, teacher)
        self.needs = frozenset(self.of)
        self.layers: list[tuple[GridTokens, GridTokens, tuple[int, int]]] = []
        for name in self.of:
            own = GridTokens(name, student, "student", "average", stride=1)
            other = GridTokens(name, teacher, "teacher", "average", stride=1)
            common = min(own.grid[0], other.grid[0]), min(own.grid[1], other.grid[1])
            if common == (1, 1):
                raise UserError(
                    f"NST compares where channels fire, but {name!r} has the grid {own.grid} in the student and "
                    f"{other.grid} in the teacher: both need several cells in the same direction"
                )
            self.layers.append((own, other, common))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the channels over the cells of the common grid of each layer."""
        return total(
            [
                channel_discrepancy(averaged(own(student), common), averaged(other(teacher), common)).mean()
                for own, other, common in self.layers
            ]
        )
