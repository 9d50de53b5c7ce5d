"""The place of the patch tokens in timm's models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.networks.base import map_to_tokens


@dataclass(frozen=True)
class TokenLayout:
    """The layout of the tokens: a map, the end of a sequence, or separate from the input of the head."""

    known: bool = True
    channels_last: bool = False
    grid: tuple[int, int] | None = None
    separate: bool = False
    norm: bool = False

    def tokens(self, cells: Any) -> tuple[Tensor | None, tuple[int, int] | None]:
        """Return the tokens and their grid, as far as they are known."""
        if not self.known:
            return None, None
        if cells.ndim == 3:
            assert self.grid is not None
            return cells[:, -self.grid[0] * self.grid[1] :], self.grid
        if self.channels_last:
            return cells.flatten(1, 2), (cells.shape[1], cells.shape[2])
        return map_to_tokens(cells), (cells.shape[2], cells.shape[3])


def find_token_layout(network: nn.Module, image: Tensor) -> TokenLayout:
    """Compare the output of `forward_features` with the last map of `forward_intermediates`."""
    model: Any = network
    final = model.forward_features(image)
    if isinstance(final, Tensor) and final.ndim == 4:
        return TokenLayout(channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
    if not hasattr(model, "forward_intermediates"):
        return TokenLayout(known=False)
    norm = True
    try:
        repeated, maps = model.forward_intermediates(image, indices=1, norm=norm)
    except AssertionError:  # a family without a norm for the last map
        norm = False
        repeated, maps = model.forward_intermediates(image, indices=1, norm=norm)
    height, width = maps[-1].shape[-2:]
    if isinstance(final, Tensor) and _equal(final[:, -height * width :], map_to_tokens(maps[-1])):
        return TokenLayout(grid=(height, width))
    return TokenLayout(known=_equal(final, repeated), separate=True, norm=norm)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-4)
    return len(first) == len(second) and all(map(_equal, first, second))
