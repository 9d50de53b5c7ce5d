"""Tokens on a grid, read from tokens or from a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec
from distill.functional import pool
from distill.heads.parts.map_reader import MapReader

Tokenizer = Literal["average", "max", "convolution"]

TOKENIZERS: dict[str, Callable[[int, int], nn.Module]] = {
    "average": lambda width, stride: nn.AvgPool2d(stride, ceil_mode=True),
    "max": lambda width, stride: nn.MaxPool2d(stride, ceil_mode=True),
    "convolution": lambda width, stride: nn.Conv2d(width, width, stride, stride),
}
"""Factories, by name, of modules that make a map of the given width coarser by the given stride."""


class GridTokens(nn.Module):
    """Reads tokens and their grid from one network: `Features` to `Features` with these alone.

    The layer is `tokens`, a tapped layer of a transformer (leading tokens beyond the number of patches are dropped), or
    a tapped map `[B, d, h, w]`, which is tokenized.

    Args:
        of: `tokens` or the name of a tap.
        spec: the network's shapes.
        side: `student` or `teacher`, for error messages.
        tokenizer: how a map becomes tokens.
        stride: the factor by which the tokenizer makes a map coarser.

    Attributes:
        grid: `(h, w)`.
        width: d.

    Raises:
        UserError: the layer is neither a map nor a token grid, or the map is smaller than the stride.
    """

    def __init__(self, of: str, spec: FeatureSpec, side: str, tokenizer: Tokenizer, stride: int) -> None:
        super().__init__()
        make = TOKENIZERS[one_of("tokenizer", tokenizer, TOKENIZERS)]
        self.read = MapReader(of, spec, side, vectors=False)
        self.width, self.grid = self.read.width, self.read.grid
        self.tokenize: nn.Module | None = None
        if len(spec[of]) == 3:
            height, width = self.grid
            if stride > min(height, width):
                raise UserError(
                    f"stride {stride} is larger than the map {of!r} of the {side}, which is {height} x {width}"
                )
            self.tokenize = make(self.width, stride)
            with torch.no_grad():
                self.grid = _size(self.tokenize(torch.zeros(1, self.width, height, width)))

    def forward(self, features: Features) -> Features:
        cells = self.read(features)
        if self.tokenize is not None:
            cells = self.tokenize(cells)
        return Features(tokens=cells.flatten(2).mT, grid=_size(cells))


def averaged(features: Features, grid: tuple[int, int]) -> Tensor:
    """Average tokens `[B, N, d]` over the cells of a coarser grid `(h, w)`: `[B, h * w, d]`."""
    tokens = features["tokens"]
    if features.grid is None or features.grid == grid:
        return tokens
    cells = tokens.mT.reshape(len(tokens), -1, *features.grid)
    return pool(cells, grid).flatten(2).mT


def _size(cells: Tensor) -> tuple[int, int]:
    return cells.shape[-2], cells.shape[-1]
