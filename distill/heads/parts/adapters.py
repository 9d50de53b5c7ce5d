"""Modules that adapt the student's maps to the teacher's channels, computing in the type of the maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.distributed import gather


class CastConv2d(nn.Conv2d):
    """A convolution that keeps the size of a map and computes in its type: `[B, c, h, w]` to `[B, d, h, w]`.

    Args:
        channels: c.
        width: d.
        side: of the kernel, odd.
        bias: whether a bias is added.
    """

    def __init__(self, channels: int, width: int, side: int = 1, bias: bool = True) -> None:
        super().__init__(channels, width, side, padding=side // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.conv2d(input, weight, bias, padding=self.padding)


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


def _mean(x: Tensor) -> Tensor:
    """Return the mean of each channel over all ranks, with gradient: `[B, d, h, w]` to `[1, d, 1, 1]`."""
    return gather(x.mean(dim=(0, 2, 3), keepdim=True)).mean(dim=0, keepdim=True)
