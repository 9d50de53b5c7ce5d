"""Modules that adapt the student's maps to the teacher's channels, computing in the type of the maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.distributed import gather


class CastConv2d(nn.Conv2d):
    """A convolution that keeps the size of a map, or with a stride divides it, and computes in the map's type.

    `[B, c, h, w]` to `[B, d, h / stride, w / stride]`, rounded up.

    Args:
        channels: c.
        width: d.
        side: of the kernel, odd.
        bias: whether a bias is added.
        stride: the factor by which the map becomes coarser.
    """

    def __init__(self, channels: int, width: int, side: int = 1, bias: bool = True, stride: int = 1) -> None:
        super().__init__(channels, width, side, stride, padding=side // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.conv2d(input, weight, bias, self.stride, self.padding)


class CastUpsampling2d(nn.ConvTranspose2d):
    """A transposed convolution, 4 x 4 and without bias, that doubles the size of a map and computes in the map's type.

    `[B, c, h, w]` to `[B, d, 2 h, 2 w]`.

    Args:
        channels: c.
        width: d.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, 4, stride=2, padding=1, bias=False)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose2d(input, self.weight.to(input.dtype), stride=2, padding=1)


class GlobalBatchNorm2d(nn.Module):
    """Batch normalization over the batches of all ranks, computing in the map's type: `[B, d, h, w]` to the same.

    It has no running statistics, since a head runs in training only, where the batch's statistics are used.

    Args:
        width: d.
        eps: added to the variance; torch's default.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        centered = input - _mean(input)
        scale = self.weight.to(input.dtype) * (_mean(centered.square()) + self.eps).rsqrt()
        return centered * scale + self.bias.to(input.dtype)


def conv_norm(channels: int, width: int, side: int = 1) -> nn.Sequential:
    """Return a convolution without bias, followed by batch normalization."""
    return nn.Sequential(CastConv2d(channels, width, side, bias=False), GlobalBatchNorm2d(width))


def resizing_conv(
    channels: int, width: int, grid: tuple[int, int], target: tuple[int, int]
) -> tuple[nn.Module, tuple[int, int]]:
    """Return a convolution without bias to half or twice as many cells per side, and the grid that it gives.

    It is 3 x 3 with stride 2 to half of the cells, transposed and 4 x 4 to twice as many, and otherwise 1 x 1, which
    leaves the grid as it is.

    Args:
        channels: of the map.
        width: channels of the result.
        grid: `(h, w)` of the map.
        target: `(h, w)` that the result should have.
    """
    if grid == (2 * target[0], 2 * target[1]):
        return CastConv2d(channels, width, side=3, bias=False, stride=2), target
    if target == (2 * grid[0], 2 * grid[1]):
        return CastUpsampling2d(channels, width), target
    return CastConv2d(channels, width, bias=False), grid


def _mean(x: Tensor) -> Tensor:
    """Return the mean of each channel over all ranks, with gradient: `[B, d, h, w]` to `[1, d, 1, 1]`."""
    return gather(x.mean(dim=(0, 2, 3), keepdim=True)).mean(dim=0, keepdim=True)
