"""Tokens on a grid, whichever features they are read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec, Shape
from distill.functional import pool

Tokenizer = Literal["average", "max", "convolution"]

TOKENIZERS: dict[str, Callable[[int, int], nn.Module]] = {
    "average": lambda width, stride: nn.AvgPool2d(stride, ceil_mode=True),
    "max": lambda width, stride: nn.MaxPool2d(stride, ceil_mode=True),
    "convolution": lambda width, stride: nn.Conv2d(width, width, stride, stride),
}
"""By name: makes what turns a map of that width into one that is coarser by that stride."""


class GridTokens(nn.Module):
    """Reads tokens and grid off one network's features: `Features` to `Features` that hold these alone.

    What it reads is the network's `tokens`, a tapped layer of a transformer (whose first tokens, as many as there are
    more than patches, are dropped as class and distillation tokens), or a tapped map `[B, d, h, w]`, which is
    tokenized.

    Args:
        of: what is read: `tokens` or the name of a tap.
        spec: the shapes of the network.
        side: `student` or `teacher`, for the sentences.
        tokenizer: how a map is tokenized.
        stride: by how much that makes it coarser.

    Attributes:
        grid: `(h, w)`.
        width: d.

    Raises:
        UserError: it is no token grid, or the map is smaller than the stride.
    """

    def __init__(self, of: str, spec: FeatureSpec, side: str, tokenizer: Tokenizer, stride: int) -> None:
        super().__init__()
        make = TOKENIZERS[one_of("tokenizer", tokenizer, TOKENIZERS)]
        shape = spec[of]
        self.of = of
        self.tokenize: nn.Module | None = None
        if len(shape) == 3:
            if stride > min(shape[1:]):
                raise UserError(
                    f"stride {stride} is larger than the map {of!r} of the {side}, which is {shape[1]} x {shape[2]}"
                )
            self.width = shape[0]
            self.tokenize = make(self.width, stride)
            with torch.no_grad():
                self.grid = _size(self.tokenize(torch.zeros(1, *shape)))
        elif spec.grid is not None and is_token_grid(shape, spec.grid):
            self.width, self.grid = shape[1], spec.grid
        else:
            raise UserError(
                f"{of!r} of the {side} is no token grid but of the shape {shape}: name 'tokens', or a layer that gives "
                "a map [d, h, w] or as many tokens as there are patches"
            )

    def forward(self, features: Features) -> Features:
        found = features[self.of]
        if self.tokenize is not None:
            cells: Tensor = self.tokenize(found)
            return Features(tokens=cells.flatten(2).mT, grid=_size(cells))
        grid = features.grid or self.grid
        return Features(tokens=found[:, -grid[0] * grid[1] :], grid=grid)


def averaged(features: Features, grid: tuple[int, int]) -> Tensor:
    """Bring tokens `[B, N, d]` to a coarser grid by averaging: `[B, h * w, d]` for the grid `(h, w)`."""
    tokens = features["tokens"]
    if features.grid is None or features.grid == grid:
        return tokens
    cells = tokens.mT.reshape(len(tokens), -1, *features.grid)
    return pool(cells, grid).flatten(2).mT


def is_token_grid(shape: Shape, grid: tuple[int, int]) -> bool:
    """Whether `(N, d)` are the patches of a grid, behind class and distillation tokens that are fewer than they."""
    patches = grid[0] * grid[1]
    return len(shape) == 2 and patches <= shape[0] < 2 * patches


def _size(cells: Tensor) -> tuple[int, int]:
    return cells.shape[-2], cells.shape[-1]
