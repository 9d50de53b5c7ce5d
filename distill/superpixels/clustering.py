"""SLIC for a batch: k-means of color and position, restricted to the 3 x 3 cells around the cell of each pixel.

Pixels are sorted into the cells of a grid once, `[B, p, q, features, pixels of a cell]`. Distances to the nine centers
and the new means are then matrix products without scatter operations, so results on a GPU are reproducible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.superpixels.association import Grid

SHIFTS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
"""Offsets from a cell to the cells of its neighborhood."""

FAR = 1e12
"""The squared distance to cells beyond the border of the image."""


def cell_grid(segments: int, height: int, width: int) -> Grid:
    """Return the grid of at most `segments` cells that are as square as possible.

    >>> cell_grid(196, 224, 224), cell_grid(7, 32, 32), cell_grid(16, 32, 128)
    ((14, 14), (3, 2), (2, 8))
    """
    rows = min(max(round(math.sqrt(segments * height / width)), 1), height, segments)
    return rows, min(segments // rows, width)


def cluster(colors: Tensor, grid: Grid, compactness: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the labels of the pixels and the colors of the centers.

    Args:
        colors: CIELAB, `[B, 3, H, W]`.
        grid: `(p, q)`, the cells in which the centers start.
        compactness: m; the squared distance is that of the colors plus m^2 times that of the positions, in cells.
        iterations: how often pixels are assigned to their nearest center and centers move to the mean of their pixels.
            A pixel that is equally near to several centers counts for each.

    Returns:
        `[B, H, W]` int64 in `0 .. p q - 1`, and `[B, p q, 3]`.
    """
    rows, columns = (_Axis.of(n, cells, colors.device) for n, cells in zip(colors.shape[2:], grid, strict=True))
    pixels = _in_cells(colors, rows, columns, compactness)
    present = (rows.present[:, None, :, None] & columns.present[None, :, None, :]).flatten(2).unsqueeze(2).to(pixels)
    base = (pixels * present).sum(dim=-1) / present.sum(dim=-1)
    pixels = torch.cat([pixels - base.unsqueeze(-1), torch.ones_like(pixels[..., :1, :])], dim=-2) * present
    beyond = torch.where(_shifted(torch.ones_like(base[:1, ..., :1])) == 0, FAR, 0.0)
    centers = base
    for _ in range(iterations):
        near = _shifted(centers) - base.unsqueeze(
            -2
        )  # small, like the pixels, so that the products lose little precision
        squares = near.square().sum(dim=-1, keepdim=True) + beyond
        distances = torch.cat([-2 * near, squares], dim=-1) @ pixels  # squared, minus the pixel's square
        nearest = distances.eq_(distances.amin(dim=-2, keepdim=True))  # 1 or 0
        sums = nearest @ pixels.mT
        sums = torch.cat([sums[..., :5] + sums[..., 5:] * base.unsqueeze(-2), sums[..., 5:]], dim=-1)
        moved = _gathered(sums)
        centers = torch.where(moved[..., 5:] > 0, moved[..., :5] / moved[..., 5:].clamp_min(1), centers)
    order = torch.arange(9, 0, -1, device=nearest.device).unsqueeze(-1)
    first = 9 - (nearest * order).amax(dim=-2).long()
    first = first.masked_fill(first == 9, 4)  # a NaN pixel has no nearest center: it stays in its cell
    return _labels(first, rows, columns), centers[..., :3].flatten(1, 2)


@dataclass(frozen=True)
class _Axis:
    """The division of the pixels along one axis into cells, whose sizes differ by at most 1."""

    home: Tensor  # [n], the cell of each pixel
    position: Tensor  # [n], its position within the cell
    members: Tensor  # [cells, size], the pixels of each cell
    present: Tensor  # [cells, size], False for the padding of cells smaller than the largest

    @classmethod
    def of(cls, n: int, cells: int, device: torch.device) -> _Axis:
        pixel, start = torch.arange(n, device=device), -(-torch.arange(cells + 1, device=device) * n // cells)
        home = pixel * cells // n
        members = start[:-1, None] + torch.arange(-(-n // cells), device=device)
        return cls(home, pixel - start[home], members.clamp_max(n - 1), members < start[1:, None])


def _in_cells(colors: Tensor, rows: _Axis, columns: _Axis, compactness: float) -> Tensor:
    """Return color and position of the pixels, `[B, p, q, 5, P]`."""
    down, right = (
        torch.arange(len(axis.home)).to(colors) * len(axis.members) / len(axis.home) for axis in (rows, columns)
    )
    positions = compactness * torch.stack(torch.meshgrid(down, right, indexing="ij")).expand(len(colors), -1, -1, -1)
    features = torch.cat([colors, positions], dim=1)[:, :, rows.members][..., columns.members]
    return features.permute(0, 2, 4, 1, 3, 5).flatten(4)


def _shifted(cells: Tensor) -> Tensor:
    """Return the values of each cell's nine neighbors, `[B, p, q, f]` to `[B, p, q, 9, f]`; 0 beyond the border."""
    _, p, q, _ = cells.shape
    padded = F.pad(cells, (0, 0, 1, 1, 1, 1))
    return torch.stack([padded[:, 1 + down :, 1 + right :][:, :p, :q] for down, right in SHIFTS], dim=3)


def _gathered(sums: Tensor) -> Tensor:
    """Sum the contributions of the nine neighbors to each cell, `[B, p, q, 9, f]` to `[B, p, q, f]`."""
    _, p, q, _, _ = sums.shape
    padded = F.pad(sums, (0, 0, 0, 0, 1, 1, 1, 1))
    shifted = [padded[:, 1 - down :, 1 - right :][:, :p, :q, i] for i, (down, right) in enumerate(SHIFTS)]
    return torch.stack(shifted).sum(dim=0)


def _labels(shift: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """Return the labels of the pixels, given their index in `SHIFTS`, `[B, p, q, P]` to `[B, H, W]`."""
    position = rows.position[:, None] * columns.members.shape[1] + columns.position
    shift = shift[:, rows.home[:, None], columns.home, position]
    return (rows.home[:, None] + shift // 3 - 1) * len(columns.members) + columns.home + shift % 3 - 1
