"""Means and standard deviations of a map's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.functional.maps import pool


def cell_moments(x: Tensor, grid: int = 1, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over the pixels of each cell of a square grid.

    The variance is divided by n - 1 for n pixels, of which each cell needs two.

    Args:
        x: `[B, d, h, w]`.
        grid: g, cells per side, like those of `adaptive_avg_pool2d`.
        eps: added to the variance.

    Returns:
        Both `[B, d, g, g]`.
    """
    center = x.mean(dim=(-2, -1), keepdim=True)
    x = x - center  # so that no large mean swallows the variance
    mean = pool(x, (grid, grid))
    variance = (pool(x.square(), (grid, grid)) - mean.square()).clamp_min(0)
    pixels = _sizes(x.shape[-2], grid, x).unsqueeze(1) * _sizes(x.shape[-1], grid, x)
    return center + mean, (variance * pixels / (pixels - 1) + eps).sqrt()


def moment_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over the channels of squared differences of a moment, mean over images and cells.

    Args:
        student: `[B, d, g, g]`.
        teacher: `[B, d, g, g]`.

    Returns:
        A scalar.
    """
    return (student - teacher).square().sum(dim=1).mean()


def gaussian_distance(student: Tensor, teacher: Tensor, grid: int = 1, ratio: float = 4.0, eps: float = 1e-5) -> Tensor:
    """WKD-F (Lv, Yang, Li, 2024): `ratio * |mu_s - mu_t|^2 + |sigma_s - sigma_t|^2`, mean over images and cells.

    With ratio 1 it is the squared Wasserstein distance between two Gaussians of independent channels.

    Args:
        student: `[B, d, h, w]`.
        teacher: `[B, d, h', w']`.
        grid: cells per side, each with a Gaussian of its own.
        ratio: weight of the means beside the standard deviations.
        eps: added to the variances.

    Returns:
        A scalar.
    """
    (student_mean, student_deviation), (teacher_mean, teacher_deviation) = (
        cell_moments(x, grid, eps) for x in (student, teacher)
    )
    return ratio * moment_difference(student_mean, teacher_mean) + moment_difference(
        student_deviation, teacher_deviation
    )


def _sizes(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the numbers of positions of a line in its cells, `[cells]`."""
    cell = torch.arange(cells, device=like.device)
    return (-(-(cell + 1) * length // cells) - cell * length // cells).to(like.dtype)
