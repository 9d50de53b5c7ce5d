"""The flow of the solution procedure (Yim, Joo, Bae, Kim, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.maps import MapHead


class FSP(MapHead):
    """Mean squared differences of the flow matrices of consecutive layers, summed over the pairs of layers.

    The flow matrix of two layers is the mean over the cells of the products of their channels, so both networks must
    have the same channels in each layer; their grids may differ. Within a network, the larger grid is pooled to the
    smaller.

    The CRD benchmark uses the stem and all stages as layers and a separate initialization: in the first 30 epochs the
    student learns from this loss alone, with weight 1, and then without it. (The weight of 50 in its script multiplies
    nothing.) Here that is `Until(epochs=30)` as the term's weight and `After(epochs=30)` as the weight of the task and
    of the other terms. The benchmark begins the second stage with a new optimizer; here one optimizer serves both.

    Args:
        of: at least two layers, shallow to deep: names of taps, patterns of them (`stage*`), `tokens`, `embedding`.

    Raises:
        UserError: fewer than two layers.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens", "embedding")) -> None:
        super().__init__(of)
        if not any("*" in name for name in self.of):
            self._require_two()

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Replace patterns by the taps that match them, and check the layers against both networks.

        Raises:
            UserError: a network has no features of that name, or the patterns stand for fewer than two layers.
        """
        super().check(student, teacher)
        self._require_two()

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of each layer.

        Raises:
            UserError: the channels of a layer differ, or there are fewer than two layers.
        """
        super().build(student, teacher)
        self._require_two()
        for layer, target in self.layers:
            if layer.width != target.width:
                raise UserError(
                    f"FSP needs equal channels, but {layer.of!r} has {layer.width} in the student and {target.width} "
                    "in the teacher: name layers of equal width, or compare them with FitNet, which has a regressor"
                )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the flow through maps `[B, d, h, w]`."""
        student_maps, teacher_maps = zip(*self.maps(student, teacher), strict=True)
        return functional.fsp(student_maps, teacher_maps)

    def _require_two(self) -> None:
        if len(self.of) < 2:
            raise UserError(f"FSP compares the flow between layers: of must name 2 or more, given {self.of}")
