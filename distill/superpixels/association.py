"""Superpixels of a token grid by soft association: each token is shared out among the cells around it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError, one_of

Grid = tuple[int, int]
Neighborhood = Literal["cells", "all"]
Gradient = Literal["values", "full"]


def superpixel_grid(grid: Grid, cell: Grid) -> Grid:
    """The grid of superpixels that cells of `cell` tokens make of `grid`; a cell that the border cuts off counts.

    >>> superpixel_grid((14, 14), (2, 2)), superpixel_grid((7, 7), (2, 2))
    ((7, 7), (4, 4))

    Raises:
        UserError: a cell without tokens.
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
    """Superpixel tokens: means of the tokens, weighted by how much each of them belongs to each superpixel.

    A superpixel starts as the mean S of its cell. Each iteration shares every token out among the superpixels in
    reach, Q = softmax(T S^T / sqrt(d)), and takes the means S anew, weighted by the columns of Q. Where the superpixels
    do not divide the grid, cells differ by a row or a column of tokens.

    Args:
        tokens: T, `[B, N, d]`, row by row.
        grid: `(h, w)` of the tokens, `h * w = N`.
        cell: tokens to a superpixel; 2 x 2 is the best that SeRKD's authors report.
        target: the grid of the superpixels, nowhere finer than that of the tokens; `superpixel_grid(grid, cell)` if
            not given. On the same target, superpixels of different networks correspond to each other.
        iterations: how often the tokens are shared out; more than 1 does not help, say the authors. 0 gives the means
            of the cells.
        neighborhood: what is in reach of a token: the 3 x 3 `cells` around its own, without those beyond the border,
            or `all` superpixels.
        gradient: it passes through the `values` that are averaged, or, `full`, through their weights too.

    Returns:
        `[B, L, d]`, row by row.

    Raises:
        UserError: a grid, a cell or another argument that does not fit.
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
    """How the last iteration of `soft_superpixels` shares the tokens out: Q, `[B, N, L]`, each row of which sums to 1.

    With 0 iterations each token belongs to its own cell.
    """
    target = target or superpixel_grid(grid, cell)
    return _associate(tokens, grid, target, iterations, neighborhood)[1].expand(len(tokens), -1, -1)


def _associate(
    tokens: Tensor, grid: Grid, target: Grid, iterations: int, neighborhood: Neighborhood
) -> tuple[Tensor, Tensor]:
    """The weights of the means and the association, `[B, N, L]` or, without the batch, `[N, L]`."""
    _check(tokens, grid, target, iterations)
    # As large as L^2 cells: less than the L^3 angles that follow, so it need not be kept to the 9 cells in reach.
    steps = _steps(grid, target, tokens.device)
    association = (steps == 0).to(tokens.dtype)
    weights = association / association.sum(dim=0)
    unreachable = steps > (1 if one_of("neighborhood", neighborhood, ("cells", "all")) == "cells" else max(target))
    for _ in range(iterations):
        scores = tokens @ (weights.mT @ tokens).mT / math.sqrt(tokens.shape[-1])
        logs = scores.masked_fill(unreachable, -math.inf).log_softmax(dim=-1)
        association = logs.exp()
        weights = logs.softmax(dim=-2)  # the columns divided by their sums, which in logs can never be 0
    return weights, association


def _steps(grid: Grid, target: Grid, device: torch.device) -> Tensor:
    """How many cells each token is away from each cell, diagonal steps allowed: `[N, L]`."""
    along = [
        (torch.arange(n, device=device).unsqueeze(1) * cells // n - torch.arange(cells, device=device)).abs()
        for n, cells in zip(grid, target, strict=True)
    ]
    return torch.maximum(along[0][:, None, :, None], along[1][None, :, None, :]).flatten(2).flatten(0, 1)


def check_grid(tokens: Tensor, grid: Grid) -> None:
    """Hold tokens against the grid that they should lie on.

    Raises:
        UserError: they are not `[B, N, d]` with `h * w = N`.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise UserError(
            f"tokens must be [B, N, d] with the N = {grid[0] * grid[1]} tokens of a {grid[0]} x {grid[1]} grid, they "
            f"are of shape {tuple(tokens.shape)}"
        )


def _check(tokens: Tensor, grid: Grid, target: Grid, iterations: int) -> None:
    check_grid(tokens, grid)
    if not all(1 <= cells <= n for cells, n in zip(target, grid, strict=True)):
        raise UserError(
            f"superpixels cannot lie on a {target[0]} x {target[1]} grid with tokens on {grid[0]} x {grid[1]}: each "
            "needs at least one token"
        )
    if iterations < 0:
        raise UserError(f"iterations must be at least 0, given {iterations}")
