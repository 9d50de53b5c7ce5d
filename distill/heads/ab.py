"""Activation boundaries (Heo, Lee, Yun, Choi, 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distill import functional
from distill.features import Features, FeatureSpec
from distill.functional import to_common_grid
from distill.heads.base import Batch, positive
from distill.heads.parts.adapters import conv_norm
from distill.heads.parts.maps import MapHead, total

SCALE = 3 / 1000
"""Of the public codes, which sum over channels and cells."""


class AB(MapHead):
    """A squared hinge that asks each of the student's neurons to be active where the teacher's is, and only there.

    It compares pre-activations, so tap layers before their ReLU. A connector, a 1 x 1 convolution with batch
    normalization, brings the student to the teacher's channels; where shapes are equal there is none, as in the public
    codes. The larger grid is pooled to the smaller. With n layers, layer i of 1 .. n counts `3 / 1000 * 2^(i - n)`
    times the sum over its channels and cells, mean over the batch.

    The CRD benchmark gave it the stages before their last ReLU as layers, the weight 1, and an initialization of its
    own: for 30 epochs the student learns this loss alone, and then the labels without it. Here that is
    `Stop(epochs=30)` as the term's weight and `Start(epochs=30)` as that of the task and of the other terms. All take
    part in every step with the weight 0 or more, as DDP asks; so weight decay acts on all parameters in both stages.

    Args:
        of: the layers: `tokens`, `embedding` or names of taps.
        margin: m, how far beyond 0 a neuron must be; 1 as in the CRD benchmark.

    Raises:
        UserError: a margin not above 0.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",), margin: float = 1.0) -> None:
        super().__init__(of)
        positive("margin", margin)
        self.margin = margin

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make a connector for each layer whose shapes differ."""
        super().build(student, teacher)
        self.connectors = nn.ModuleList(
            nn.Identity() if (own.width, own.grid) == (other.width, other.grid) else conv_norm(own.width, other.width)
            for own, other in self.layers
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        losses = []
        for place, (connector, maps) in enumerate(zip(self.connectors, self.maps(student, teacher), strict=True)):
            own, other = to_common_grid(*maps)
            weight = SCALE * 2.0 ** (place + 1 - len(self.of))
            losses.append(weight * functional.activation_boundaries(connector(own), other, self.margin))
        return total(losses)
