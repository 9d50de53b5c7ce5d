"""Knowledge review (Chen, Liu, Zhao, Jia, 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d, conv_norm
from distill.heads.parts.maps import MapHead, total


class ReviewKD(MapHead):
    """Each of the teacher's layers teaches the student's layer of that depth and, through fusion, the deeper ones.

    From deep to shallow, the student's layer is brought to a common width and fused with what came of the deeper
    layers, by attention to either at each cell (ABF). The result, on the teacher's grid and with its channels, is
    compared with the teacher's layer, whole and in pools of 4, 2 and 1 cells a side (HCL). The loss is the sum over the
    layers.

    In comparisons it has the stages before their last ReLU as layers, and the weight 5.

    Args:
        of: the layers, shallow to deep: names of taps, `tokens`, `embedding`.
        width: the most channels to fuse in; the deepest layer's channels, if they are fewer, are taken.

    Raises:
        UserError: a width below 1.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens", "embedding"), width: int = 512) -> None:
        super().__init__(of)
        if width < 1:
            raise UserError(f"width must be at least 1, given {width}")
        self.width = width

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make the fusion for each layer."""
        super().build(student, teacher)
        width = min(self.width, self.layers[-1][0].width)
        self.fusions = nn.ModuleList(
            Fusion(own.width, width, other.width, deepest=place == len(self.layers) - 1)
            for place, (own, other) in enumerate(self.layers)
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        losses, deeper = [], None
        for fusion, (own, other) in reversed(list(zip(self.fusions, self.maps(student, teacher), strict=True))):
            result, deeper = fusion(own, deeper, (other.shape[-2], other.shape[-1]))
            losses.append(functional.hierarchical_context_loss(result, other))
        return total(losses)


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a student's layer with the deeper ones.

    Args:
        channels: of the student's layer.
        width: of the fused maps.
        teacher_channels: of the result.
        deepest: there is nothing deeper to fuse with.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = conv_norm(channels, width)
        self.attention = None if deepest else CastConv2d(2 * width, 2)
        self.expand = conv_norm(width, teacher_channels, side=3)

    def forward(self, own: Tensor, deeper: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Fuse `own` `[B, c, h, w]` with `deeper` `[B, width, h', w']`.

        Returns:
            The result on `grid`, `[B, teacher_channels, *grid]`, and the fused map, `[B, width, *grid]`.
        """
        fused: Tensor = self.reduce(own)
        if self.attention is not None and deeper is not None:
            deeper = _resized(deeper, (own.shape[-2], own.shape[-1]))
            share = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        fused = _resized(fused, grid)
        return self.expand(fused), fused


def _resized(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map on another grid, each cell the nearest of the old ones."""
    return x if tuple(x.shape[-2:]) == grid else F.interpolate(x, grid, mode="nearest")
