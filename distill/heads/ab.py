"""Activation boundaries (Heo, Lee, Yun, Choi, 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill import functional
from distill.errors import require_above
from distill.features import Features, FeatureSpec
from distill.functional import to_common_grid
from distill.heads.base import Batch
from distill.heads.parts.adapters import conv_norm
from distill.heads.parts.maps import MapHead, total

SCALE = 3 / 1000
"""Factor of the public codes, which sum over channels and cells."""


class AB(MapHead):
    """A squared hinge that makes each of the student's neurons active exactly where the teacher's is.

    It compares pre-activations, so tap layers before their ReLU. A connector, a 1 x 1 convolution with batch
    normalization, maps the student to the teacher's channels; as in the public codes, there is none if the shapes are
    equal. The larger grid is pooled to the smaller. Of n layers, layer i in 1 .. n counts `3 / 1000 * 2^(i - n)` times
    the sum over its channels and cells, mean over the batch.

    The CRD benchmark uses the stages before their last ReLU as layers, weight 1, and a separate initialization: for 30
    epochs the student learns from this loss alone, and then from the labels without it. Here that is
    `Until(epochs=30)` as the term's weight and `After(epochs=30)` as the weight of the task and of the other terms. All
    terms take part in every step, with weight 0 if need be, as DDP requires; weight decay therefore acts on all
    parameters in both stages. The benchmark begins the second stage with a new optimizer; here one optimizer serves
    both. Where grids differ by a factor of 2, its connectors are strided or transposed convolutions.

    Args:
        of: the layers: `tokens`, `embedding` or names of taps.
        margin: m, the distance from 0 that a neuron must reach; 1 as in the CRD benchmark.

    Raises:
        UserError: a margin not above 0.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",), margin: float = 1.0) -> None:
        super().__init__(of)
        require_above(0, margin=margin)
        self.margin = margin

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build a connector for each layer whose shapes differ."""
        super().build(student, teacher)
        self.connectors = nn.ModuleList(
            nn.Identity()
            if (layer.width, layer.grid) == (target.width, target.grid)
            else conv_norm(layer.width, target.width)
            for layer, target in self.layers
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        losses = []
        for number, (connector, maps) in enumerate(zip(self.connectors, self.maps(student, teacher), strict=True), 1):
            student_map, teacher_map = to_common_grid(*maps)
            weight = SCALE * 2.0 ** (number - len(self.of))
            losses.append(weight * functional.activation_boundaries(connector(student_map), teacher_map, self.margin))
        return total(losses)
