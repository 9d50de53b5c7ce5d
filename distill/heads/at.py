"""Attention transfer (Zagoruyko, Komodakis, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill import functional
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.maps import MapHead, total


class AT(MapHead):
    """Compares where the networks are active: maps of squares, averaged over the channels, each image's at length 1.

    The loss is the sum over the layers. It has no parameters and asks for no equal widths; the larger grid is pooled to
    the smaller. The CRD benchmark gave it all stages as layers and the weight 1000.

    Args:
        of: the layers: `tokens` or names of taps.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",)) -> None:
        super().__init__(of)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Hold the grids against the comparison; there is nothing to make.

        Raises:
            UserError: a layer has a single cell.
        """
        super().build(student, teacher)
        self.require_cells()

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        return total([functional.attention_transfer(own, other) for own, other in self.maps(student, teacher)])
