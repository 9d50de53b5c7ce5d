"""Superpixels of a token grid by soft association of each token with the cells around it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError, one_of, require_at_least

Grid = tuple[int, int]
Neighborhood = Literal["cells", "all"]
Gradient = Literal["values", "full"]


def superpixel_grid(grid: Grid, cell: Grid) -> Grid:
    """Return the grid of superpixels for cells of `cell` tokens on `grid`, including cells cut off by the border.

    >>> superpixel_grid((14, 14), (2, 2)), superpixel_grid((7, 7), (2, 2))
    ((7, 7), (4, 4))

    Raises:
        UserError: the cell has no tokens.
    """
    if min(cell) < 1:
        raise UserError(f"cell must be at least 1 x 1 tokens, given {cell[0]} x {cell[1]}")
    return -(-grid[0] // cell[0]), -(-grid[1] // cell[1])


def soft_superpixels(
    tokens: Tensor,
    grid: Grid,
    cell: Grid = (2, 2),
    target: Grid | None = None,
    iterations: int = 1,
    neighborhood: Neighborhood = "cells",
    gradient: Gradient = "values",
) -> Tensor:
    """Return superpixel tokens: means of the tokens, weighted by their association with each superpixel.

    A superpixel starts as the mean S of its cell. Each iteration associates every token with the superpixels in its
    neighborhood, Q = softmax(T S^T / sqrt(d)), and recomputes the means S, weighted by the columns of Q. If the
    superpixels do not divide the grid, the sizes of cells differ by a row or a column of tokens.

    Args:
        tokens: T, `[B, N, d]`, row by row.
        grid: `(h, w)` of the tokens, `h * w = N`.
        cell: tokens per superpixel; 2 x 2 is the best size that SeRKD's authors report.
        target: the grid of the superpixels, not finer than that of the tokens; by default
            `superpixel_grid(grid, cell)`. On the same target, superpixels of different networks correspond.
        iterations: number of iterations; according to the authors more than 1 does not help. 0 returns the means of
            the cells.
        neighborhood: the superpixels that a token can belong to: the 3 x 3 `cells` around the cell that contains it,
            without those beyond the border, or `all` superpixels.
        gradient: through the averaged `values` only, or `full`, through their weights too.

    Returns:
        `[B, L, d]`, row by row.

    Raises:
        UserError: a grid, a cell or another argument does not fit.
    """
    source = tokens if one_of("gradient", gradient, ("values", "full")) == "full" else tokens.detach()
    weights, _ = _associate(source, grid, target or superpixel_grid(grid, cell), iterations, neighborhood)
    return weights.mT @ tokens


def soft_association(
    tokens: Tensor,
    grid: Grid,
    cell: Grid = (2, 2),
    target: Grid | None = None,
    iterations: int = 1,
    neighborhood: Neighborhood = "cells",
) -> Tensor:
    """Return the association Q `[B, N, L]` of the last iteration of `soft_superpixels`; each row sums to 1.

    With 0 iterations each token belongs to the cell that contains it.
    """
    target = target or superpixel_grid(grid, cell)
    return _associate(tokens, grid, target, iterations, neighborhood)[1].expand(len(tokens), -1, -1)


def _associate(
    tokens: Tensor, grid: Grid, target: Grid, iterations: int, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor]:
    """Return the weights of the means and the association, `[B, N, L]` or, without iterations, `[N, L]`."""
    _check(tokens, grid, target, iterations)
    # Dense over all L cells, which is cheaper than the L^3 angles that follow, so there is no need for a sparse form.
    steps = _steps(grid, target, tokens.device)
    association = (steps == 0).to(tokens.dtype)
    weights = association / association.sum(dim=0)
    unreachable = steps > (1 if one_of("neighborhood", neighborhood, ("cells", "all")) == "cells" else max(target))
    for _ in range(iterations):
        scores = tokens @ (weights.mT @ tokens).mT / math.sqrt(tokens.shape[-1])
        logs = scores.masked_fill(unreachable, -math.inf).log_softmax(dim=-1)
        association = logs.exp()
        weights = logs.softmax(dim=-2)  # columns divided by their sums, which cannot be 0 in logs
    return weights, association


def _steps(grid: Grid, target: Grid, device: torch.device) -> Tensor:
    """Return the distance `[N, L]` of each token's cell to each cell, in steps that may be diagonal."""
    along = [
        (torch.arange(n, device=device).unsqueeze(1) * cells // n - torch.arange(cells, device=device)).abs()
        for n, cells in zip(grid, target, strict=True)
    ]
    return torch.maximum(along[0][:, None, :, None], along[1][None, :, None, :]).flatten(2).flatten(0, 1)


def check_grid(tokens: Tensor, grid: Grid) -> None:
    """Check tokens against their grid.

    Raises:
        UserError: the tokens are not `[B, N, d]` with `h * w = N`.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise UserError(
            f"tokens must be [B, N, d] with the N = {grid[0] * grid[1]} tokens of a {grid[0]} x {grid[1]} grid, "
            f"given {tuple(tokens.shape)}"
        )


def _check(tokens: Tensor, grid: Grid, target: Grid, iterations: int) -> None:
    check_grid(tokens, grid)
    if not all(1 <= cells <= n for cells, n in zip(target, grid, strict=True)):
        raise UserError(
            f"target cannot be {target[0]} x {target[1]} superpixels for {grid[0]} x {grid[1]} tokens: each superpixel "
            "needs at least one token"
        )
    require_at_least(0, iterations=iterations)
