"""Knowledge review (Chen, Liu, Zhao, Jia, 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import require_at_least
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d, conv_norm
from distill.heads.parts.maps import MapHead, total


class ReviewKD(MapHead):
    """Comparison of each of the teacher's layers with the student's layer of that depth, fused with the deeper ones.

    From deep to shallow, the student's layer is projected to a common width and fused with the fused deeper layers, by
    attention to either at each cell (ABF). The result, on the teacher's grid and with its channels, is compared with
    the teacher's layer, whole and pooled to 4, 2 and 1 cells per side (HCL). The loss is the sum over the layers.

    The authors' code and mdistiller read the student's stages after their last ReLU, the teacher's before it, and the
    pooled embedding of both: `of: [stage*, embedding]` and `teacher_of: [pre*, embedding]` with `taps: benchmark`. The
    term's weight there depends on the pair of networks (5 for most) and grows over 20 epochs. Their factor is constant
    within an epoch; that of `Warmup(epochs=20)` grows with every step.

    Args:
        of: the student's layers, shallow to deep: names of taps, `tokens`, `embedding`.
        width: the most channels of the fused maps, 512 as in the authors' code; the deepest layer's channels, if they
            are fewer.
        teacher_of: the teacher's layers, one for each of `of`; by default those of the same names.

    Raises:
        UserError: a width below 1, or lists of different lengths.
    """

    def __init__(
        self,
        of: Sequence[str] | str = ("tokens", "embedding"),
        width: int = 512,
        teacher_of: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(of, teacher_of)
        require_at_least(1, width=width)
        self.width = width

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the fusion for each layer."""
        super().build(student, teacher)
        width = min(self.width, self.layers[-1][0].width)
        self.fusions = nn.ModuleList(
            Fusion(layer.width, width, target.width, deepest=index == len(self.layers) - 1)
            for index, (layer, target) in enumerate(self.layers)
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        losses, deeper = [], None
        layers = list(zip(self.fusions, self.maps(student, teacher), strict=True))
        for fusion, (student_map, teacher_map) in reversed(layers):
            result, deeper = fusion(student_map, deeper, (teacher_map.shape[-2], teacher_map.shape[-1]))
            losses.append(functional.hierarchical_context_loss(result, teacher_map))
        return total(losses)


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a student's layer with the deeper ones.

    Weights of its convolutions, except the attention's, begin as in the public codes: uniform within
    +-sqrt(3 / fan-in), sqrt(3) times torch's default.

    Args:
        channels: of the student's layer.
        width: of the fused maps.
        teacher_channels: of the result.
        deepest: whether there is no deeper layer to fuse with.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = conv_norm(channels, width)
        self.attention = None if deepest else CastConv2d(2 * width, 2)
        self.expand = conv_norm(width, teacher_channels, side=3)
        for convolution in (self.reduce[0], self.expand[0]):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, layer: Tensor, deeper: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Fuse `layer` `[B, c, h, w]` with `deeper` `[B, width, h', w']`.

        Returns:
            The result on `grid`, `[B, teacher_channels, *grid]`, and the fused map, `[B, width, *grid]`.
        """
        fused: Tensor = self.reduce(layer)
        if self.attention is not None and deeper is not None:
            deeper = _resized(deeper, (layer.shape[-2], layer.shape[-1]))
            share = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        fused = _resized(fused, grid)
        return self.expand(fused), fused


def _resized(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the map on another grid, by nearest neighbor."""
    return x if tuple(x.shape[-2:]) == grid else F.interpolate(x, grid, mode="nearest")
