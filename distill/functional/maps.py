"""Losses between feature maps `[B, d, h, w]`, each a scalar, the mean over the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average a map over the cells of another grid like `adaptive_avg_pool2d`, deterministic on a GPU too.

    Args:
        x: `[B, d, h, w]`.
        grid: `(h', w')`; the cells overlap if it does not divide `(h, w)`.

    Returns:
        `[B, d, h', w']`; `x` itself if its grid is the same.
    """
    height, width = x.shape[-2:]
    if (height, width) == grid:
        return x
    if height % grid[0] == width % grid[1] == 0:
        return F.avg_pool2d(x, (height // grid[0], width // grid[1]))
    return _averages(height, grid[0], x) @ x @ _averages(width, grid[1], x).mT


def to_common_grid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pool two maps to the smaller height and the smaller width of both: `[B, d_x, h, w]` and `[B, d_y, h, w]`."""
    grid = min(x.shape[-2], y.shape[-2]), min(x.shape[-1], y.shape[-1])
    return pool(x, grid), pool(y, grid)


def attention_map(x: Tensor) -> Tensor:
    """Return the normalized mean of squares over the channels: `[B, d, h, w]` to `[B, h * w]`; 0 stays 0."""
    return F.normalize(x.square().mean(dim=1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """AT: mean squared difference of the attention maps, `mean (Q_s / |Q_s| - Q_t / |Q_t|)^2`, `Q = mean_c f_c^2`.

    Args:
        student: `[B, d_s, h, w]`.
        teacher: `[B, d_t, h', w']`; the larger grid is pooled to the smaller.
    """
    student, teacher = to_common_grid(student, teacher)
    return F.mse_loss(attention_map(student), attention_map(teacher))


def factor_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """FT: mean absolute difference of the factors' attention maps.

    Args:
        student: factors `[B, k, h, w]`.
        teacher: factors `[B, k', h', w']`; the larger grid is pooled to the smaller.
    """
    student, teacher = to_common_grid(student, teacher)
    return F.l1_loss(attention_map(student), attention_map(teacher))


def vid(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """VID: mean of `((mu - t)^2 / sigma^2 + log sigma^2) / 2`, the negative log-likelihood without its constant.

    Args:
        mean: mu, `[B, d, h, w]`, predicted from the student.
        variance: sigma^2, `[d]`, above 0.
        teacher: t, `[B, d, h, w]`.
    """
    variance = variance.view(-1, 1, 1)
    return 0.5 * ((mean - teacher).square() / variance + variance.log()).mean()


def activation_boundaries(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """AB: squared hinge that moves the student's pre-activations beyond the margin on the teacher's side of 0.

    `(s + m)^2` if `s > -m` and `t <= 0`, `(s - m)^2` if `s <= m` and `t > 0`, else 0: the sum over channels and cells,
    the mean over the batch.

    Args:
        student: pre-activations `[B, d, h, w]`.
        teacher: pre-activations `[B, d, h, w]`.
        margin: m.
    """
    short = torch.where(teacher > 0, margin - student, margin + student)
    return short.clamp_min(0).square().flatten(1).sum(dim=1).mean()


def flow_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """Mean over the cells of the products of two layers' channels.

    Args:
        lower: `[B, c, h, w]`.
        upper: `[B, d, h', w']`; the larger grid is pooled to the smaller.

    Returns:
        `[B, c, d]`.
    """
    lower, upper = to_common_grid(lower, upper)
    return lower.flatten(2) @ upper.flatten(2).mT / (lower.shape[-2] * lower.shape[-1])


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """FSP: mean squared differences of the flow matrices of consecutive layers, summed over the pairs of layers.

    Args:
        student: maps of two or more layers, shallow to deep, each `[B, d, h, w]`.
        teacher: maps of the same layers with the same channels; the grids may differ.
    """
    losses = [
        F.mse_loss(flow_matrix(*student[pair : pair + 2]), flow_matrix(*teacher[pair : pair + 2]))
        for pair in range(len(student) - 1)
    ]
    return torch.stack(losses).sum()


def hierarchical_context_loss(student: Tensor, teacher: Tensor, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    """HCL of ReviewKD: weighted mean squared difference of the whole maps and of pooled ones.

    The whole map has weight 1 and each level half the previous weight; the sum is divided by the sum of the weights.

    Args:
        student: `[B, d, h, w]`.
        teacher: `[B, d, h, w]`.
        levels: sides of the pooled grids; levels not below both sides of the map are skipped.
    """
    losses, weights = [F.mse_loss(student, teacher)], [1.0]
    for side in levels:
        if side < min(student.shape[-2:]):
            losses.append(F.mse_loss(pool(student, (side, side)), pool(teacher, (side, side))))
            weights.append(weights[-1] / 2)
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


def _averages(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the averaging matrix `[cells, length]` from positions of a line to its cells."""
    position = torch.arange(length, device=like.device)
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    first, beyond = cell * length // cells, -(-(cell + 1) * length // cells)
    within = ((position >= first) & (position < beyond)).to(like.dtype)
    return within / within.sum(dim=1, keepdim=True)
