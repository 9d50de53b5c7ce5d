"""SLIC for a batch: k-means of color and position, restricted to the 3 x 3 cells around the cell of each pixel.

Pixels are sorted into the cells of a grid once. Distances to the nine centers and the new means are then matrix
products without scatter operations, so results on a GPU are reproducible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.superpixels.association import Grid

FAR = 1e12
"""Half the squared distance to cells beyond the border of the image."""


def cell_grid(segments: int, height: int, width: int) -> Grid:
    """Return the grid of at most `segments` cells that are as square as possible.

    >>> cell_grid(196, 224, 224), cell_grid(7, 32, 32), cell_grid(16, 32, 128)
    ((14, 14), (3, 2), (2, 8))
    """
    rows = min(max(round(math.sqrt(segments * height / width)), 1), height, segments)
    return rows, min(segments // rows, width)


class Clustering:
    """The clustering of images of one size, in memory that serves call after call.

    On a CPU most of the time is that of memory: allocated anew, its pages are first filled with zeros, and what does
    not fit the caches is slow to come. So give few images at a time.

    Args:
        size: `(H, W)` of the images.
        grid: `(p, q)`, the cells in which the centers start.
        compactness: m; the squared distance is that of the colors plus m^2 times that of the positions, in cells.
        iterations: how often pixels are assigned to their nearest center and centers move to the mean of their pixels.
            A pixel that is equally near to several centers counts for each.
        most: the largest number of images in a call.
        like: a tensor on the device and of the type to compute with.
    """

    def __init__(
        self, size: tuple[int, int], grid: Grid, compactness: float, iterations: int, most: int, like: Tensor
    ) -> None:
        self._grid = grid
        self._iterations = iterations
        self._rows, self._columns = (_Axis.of(n, cells, like.device) for n, cells in zip(size, grid, strict=True))
        self._cell = self._rows.members.shape[1], self._columns.members.shape[1]
        present = self._rows.present[:, None, :, None] & self._columns.present[:, None, :]
        self._present = present.to(like)  # [p, q, rows of a cell, columns of a cell], 0 for padding
        self._counts = self._present.sum(dim=(2, 3))
        down, right = (
            axis.members * (compactness * len(axis.members) / len(axis.home)) for axis in (self._rows, self._columns)
        )
        positions = torch.stack([down[:, None, :, None].expand_as(present), right[:, None, :].expand_as(present)])
        positions = positions.to(like) * self._present
        means = positions.sum(dim=(3, 4)) / self._counts  # [2, p, q]
        # For each pixel of a cell: color and position relative to the cell's mean, and 1; 0 for padding.
        self._pixels = like.new_empty(most, *grid, 6, *self._cell)
        self._pixels[:, :, :, 3:5] = ((positions - means[..., None, None]) * self._present).permute(1, 2, 0, 3, 4)
        self._pixels[:, :, :, 5] = self._present
        self._base = like.new_empty(most, 5, *grid)  # the cells' means
        self._base[:, 3:] = means
        self._nearest = like.new_empty(most * grid[0] * grid[1], 9, self._cell[0] * self._cell[1])
        beyond = F.unfold(like.new_zeros(1, 1, *grid) + 1, 3, padding=1)  # [1, 9, p q]
        self._beyond = FAR * (1 - beyond).unsqueeze(1)

    def __call__(self, colors: Tensor, last_centers: bool = True) -> tuple[Tensor, Tensor]:
        """Return the labels of the pixels and the colors of the centers.

        Args:
            colors: CIELAB, `[B, 3, H, W]`.
            last_centers: whether centers move after the last assignment too, which costs time and changes no label.

        Returns:
            `[B, H, W]` int64 in `0 .. p q - 1`, and `[B, p q, 3]`.
        """
        count, cells = len(colors), self._grid[0] * self._grid[1]
        self._enter(colors)
        pixels = self._pixels[:count].flatten(4).flatten(0, 2)  # [B p q, 6, P]
        base = self._base[:count].flatten(2).unsqueeze(2)  # [B, 5, 1, p q]
        nearest = self._nearest[: len(pixels)]
        centers = self._base[:count]
        for iteration in range(1, self._iterations + 1):
            # Near centers are small, like the pixels, so that the products lose little precision.
            near = base - F.unfold(centers, 3, padding=1).view(count, 5, 9, cells)
            squares = self._beyond.add(near.square().sum(dim=1, keepdim=True), alpha=0.5)
            # Half the squared distance, minus half the pixel's square.
            weights = torch.cat([near, squares], dim=1).permute(0, 3, 2, 1).reshape(-1, 9, 6)
            torch.bmm(weights, pixels, out=nearest)
            nearest.eq_(nearest.amin(dim=1, keepdim=True))  # 1 or 0
            if iteration < self._iterations or last_centers:
                sums = torch.bmm(pixels, nearest.mT).view(count, cells, 6, 9).permute(0, 2, 3, 1).contiguous()
                sums[:, :5].addcmul_(sums[:, 5:], base)
                sums = F.fold(sums.flatten(1, 2), self._grid, 3, padding=1)  # [B, 6, p, q]
                centers = torch.where(sums[:, 5:] > 0, sums[:, :5] / sums[:, 5:].clamp_min(1), centers)
        return self._labels(nearest), centers[:, :3].flatten(2).mT

    def _enter(self, colors: Tensor) -> None:
        """Write colors to the pixels of the cells."""
        if not self._rows.is_even:
            colors = _taken(colors, self._rows.members.flatten(), dim=2)
        if not self._columns.is_even:
            colors = _taken(colors, self._columns.members.flatten(), dim=3)
        (p, q), (height, width) = self._grid, self._cell
        features = self._pixels[: len(colors), :, :, :3]
        features.copy_(colors.reshape(len(colors), 3, p, height, q, width).permute(0, 2, 4, 1, 3, 5))
        is_padded = not (self._rows.is_even and self._columns.is_even)
        if is_padded:
            features *= self._present.unsqueeze(2)
        means = features.sum(dim=(4, 5)) / self._counts.unsqueeze(2)
        features -= means[..., None, None]
        if is_padded:
            features *= self._present.unsqueeze(2)
        self._base[: len(colors), :3] = means.permute(0, 3, 1, 2)

    def _labels(self, nearest: Tensor) -> Tensor:
        """Return the labels of the pixels `[B, H, W]`, given which of the nine centers are nearest, `[B p q, 9, P]`.

        Of several, it is the center with the lowest label. A NaN pixel has no nearest center and stays in its cell.
        """
        (p, q), (height, width) = self._grid, self._cell
        step, home = torch.arange(-1, 2, device=nearest.device), q + 2
        # Positive, and larger for lower labels. Where q < 3 gives two neighbors one number, one is beyond the border.
        order = home - (step.unsqueeze(1) * q + step).view(9, 1)
        found = nearest.mul_(order).amax(dim=1)
        found.add_(found.clone().eq_(0), alpha=home)
        found = found.view(-1, p, q, height, width).permute(0, 1, 3, 2, 4)
        labels = torch.empty(found.shape, dtype=torch.int64, device=found.device).copy_(found)
        labels = labels.view(-1, p * height, q * width)
        if not self._rows.is_even:
            labels = _taken(labels, self._rows.padded, dim=1)
        if not self._columns.is_even:
            labels = _taken(labels, self._columns.padded, dim=2)
        cell = self._rows.home.unsqueeze(1) * q + self._columns.home
        return torch.sub(cell + home, labels, out=labels)


@dataclass(frozen=True)
class _Axis:
    """The division of the pixels along one axis into cells, whose sizes differ by at most 1.

    Smaller cells are padded at their end by one pixel.
    """

    home: Tensor  # [n], the cell of each pixel
    padded: Tensor  # [n], its number among the pixels with the padding
    members: Tensor  # [cells, size], the pixels of each cell
    present: Tensor  # [cells, size], False for the padding
    is_even: bool  # all cells have the same size

    @classmethod
    def of(cls, n: int, cells: int, device: torch.device) -> _Axis:
        size = -(-n // cells)
        pixel, start = torch.arange(n, device=device), -(-torch.arange(cells + 1, device=device) * n // cells)
        home = pixel * cells // n
        members = start[:-1, None] + torch.arange(size, device=device)
        present = members < start[1:, None]
        return cls(home, home * size + pixel - start[home], members.clamp_max(n - 1), present, n % cells == 0)


def _taken(images: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return rows or columns of images by `gather`, which on a CPU is faster than other ways."""
    shape = list(images.shape)
    shape[dim] = len(index)
    return images.gather(dim, index.view([-1 if d == dim else 1 for d in range(images.ndim)]).expand(shape))
