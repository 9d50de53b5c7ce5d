"""The flow of the solution procedure (Yim, Joo, Bae, Kim, 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.maps import MapHead


class FSP(MapHead):
    """Mean squared differences of the flow matrices of consecutive layers, summed over the pairs of layers.

    The flow matrix of two layers is the mean over the cells of the products of their channels, so both networks must
    have the same channels in each layer; their grids may differ. Within a network the larger grid is pooled to the
    smaller.

    The CRD benchmark gave it the stem and all stages as layers, the weight 50, and an initialization of its own: for
    the first epochs the student learns this loss alone, and then none of it. Here that is `Stop(value=50, epochs=30)`
    as the term's weight and `Start(epochs=30)` as that of the task and of the other terms.

    Args:
        of: two layers or more, shallow to deep: names of taps, `tokens`, `embedding`.

    Raises:
        UserError: there are fewer than two layers.
    """

    same_widths: ClassVar[bool] = True

    def __init__(self, of: Sequence[str] | str = ("tokens", "embedding")) -> None:
        super().__init__(of)
        if len(self.of) < 2:
            raise UserError(f"FSP compares the flow between layers: of must name 2 or more, given {self.of}")

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Hold the channels of both networks against each other; there is nothing to make.

        Raises:
            UserError: they differ in a layer.
        """
        super().build(student, teacher)
        for own, other in self.layers:
            if own.width != other.width:
                raise UserError(
                    f"FSP needs equal channels, but {own.of!r} has {own.width} in the student and {other.width} in the "
                    "teacher: name layers of equal width, or compare them with FitNet, which has a regressor"
                )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the flow through maps `[B, d, h, w]`."""
        own, other = zip(*self.maps(student, teacher), strict=True)
        return functional.fsp(own, other)
