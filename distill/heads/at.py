"""Attention transfer (Zagoruyko, Komodakis, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill import functional
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.maps import MapHead, total


class AT(MapHead):
    """Mean squared difference of attention maps: squares averaged over the channels, normalized per image.

    The loss is the sum over the layers. It has no parameters and needs no equal widths; the larger grid is pooled to
    the smaller. The CRD benchmark uses all stages as layers, with weight 1000.

    Args:
        of: the layers: `tokens` or names of taps.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",)) -> None:
        super().__init__(of)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of each layer.

        Raises:
            UserError: the common grid of a layer has a single cell.
        """
        super().build(student, teacher)
        self.require_cells()

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        return total([functional.attention_transfer(*maps) for maps in self.maps(student, teacher)])
