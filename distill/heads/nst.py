"""Neuron selectivity transfer (Huang, Wang, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill.features import Features, FeatureSpec
from distill.functional import channel_discrepancy, to_common_grid
from distill.heads.base import Batch
from distill.heads.parts.maps import MapHead, total


class NST(MapHead):
    """MMD^2 between both networks' channels with the kernel (x . y)^2, mean over B.

    A channel is the vector of its activations over the cells, normalized to length 1. Channels and grids of the two
    networks may differ; the larger grid is pooled to the smaller. The loss is the sum over the layers.

    The CRD benchmark uses all stages but the stem as layers, with weight 50.

    Args:
        of: the layers: `tokens`, names of taps or patterns of them (`stage*`).
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
        losses = []
        for maps in self.maps(student, teacher):
            student_map, teacher_map = to_common_grid(*maps)
            losses.append(channel_discrepancy(student_map.flatten(2).mT, teacher_map.flatten(2).mT).mean())
        return total(losses)
