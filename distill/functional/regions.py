"""Losses between class scores of regions: of pooled parts of a map, or of its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.maps import pool


def region_means(x: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Average a map over the cells of grids of several sizes.

    The map is first pooled to the finest grid, and from this to the others, so these are the averages over the map
    itself only if the finest grid divides it.

    Args:
        x: `[B, d, h, w]`.
        scales: cells per side of each grid.

    Returns:
        `[B, N, d]`, the N = sum of scales^2 regions in the order of the scales, each grid row by row.
    """
    finest = pool(x, (max(scales), max(scales)))
    return torch.cat([pool(finest, (scale, scale)).flatten(2) for scale in scales], dim=2).mT


def region_weights(teacher_logits: Tensor, target: Tensor, complementary: float = 2.0) -> Tensor:
    """Weigh each region by whether the teacher is as right about it as about the whole image (SDD, 2024).

    Args:
        teacher_logits: `[B, N, K]`, of which the first region is the whole image.
        target: int64 `[B]`.
        complementary: weight of a region where the teacher is right and for the image wrong, or the other way round;
            the others have 1.

    Returns:
        `[B, N]`.
    """
    is_right = teacher_logits.argmax(dim=-1) == target.unsqueeze(1)
    agrees = is_right == is_right[:, :1]
    return torch.where(agrees, 1.0, complementary).to(teacher_logits.dtype)


def class_activation_difference(
    student: Tensor, teacher: Tensor, resolution: int = 2, normalize: bool = False
) -> Tensor:
    """CAT-KD (Guo, Yan, Li, Lin, 2023): mean squared difference of class activation maps, pooled to one resolution.

    Args:
        student: `[B, K, h, w]`.
        teacher: `[B, K, h', w']`.
        resolution: cells per side after pooling.
        normalize: whether each pooled map of a class is first scaled to length 1.

    Returns:
        A scalar.
    """
    student, teacher = (pool(x, (resolution, resolution)).flatten(2) for x in (student, teacher))
    if normalize:
        student, teacher = (_normalized(x) for x in (student, teacher))
    return F.mse_loss(student, teacher)


def _normalized(x: Tensor) -> Tensor:
    """Scale the last axis to length 1; at length 0, the value and the gradient are 0."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length <= 1e-12, math.inf)
