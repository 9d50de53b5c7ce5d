"""Losses of a student's features against the teacher's own values, each a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over all entries, of features as they are.

    Args:
        student: `[..., d]`.
        teacher: `[..., d]`.
    """
    return F.mse_loss(student, teacher)


def cosine_distance(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of `1 - cos(s, t)` over all vectors; 1 for a vector of zeros, whose gradient stays finite.

    Args:
        student: `[..., d]`.
        teacher: `[..., d]`.
        eps: the least length that a vector is divided by; torch's default.
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1, eps=eps)).mean()


def resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate a map bilinearly like `interpolate(..., align_corners=False)`, deterministic on a GPU too.

    Args:
        x: `[B, d, h, w]`.
        grid: `(h', w')`, larger or smaller.

    Returns:
        `[B, d, h', w']`; `x` itself if its grid is the same.
    """
    height, width = x.shape[-2:]
    if (height, width) == grid:
        return x
    return _interpolation(height, grid[0], x) @ x @ _interpolation(width, grid[1], x).mT


def _interpolation(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the matrix `[cells, length]` of linear interpolation from positions of a line to its cells."""
    lines = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(lines[None], size=cells, mode="linear", align_corners=False)[0].mT
