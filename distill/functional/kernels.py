"""Kernels between the vectors of one network, and discrepancies between two networks' kernels.

With `rows`, a kernel is that of the rows of this rank's vectors with all L, `[R, L]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.distributed import ALL_ROWS, Rows


def normalized_gram(x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Return inner products of all pairs, each row normalized to length 1 (similarity-preserving KD, Tung, Mori, 2019).

    The result is invariant to a common scale and a common rotation of the vectors.

    Args:
        x: `[..., L, d]`.
        rows: the rows to compute, by default all.

    Returns:
        `[..., L, L]`, or `[R, L]`; rows of zero products stay 0.
    """
    return _normalized(x[..., rows.index, :] @ x.mT, dim=-1)


def conditional_probabilities(x: Tensor, eps: float = 1e-7, rows: Rows = ALL_ROWS) -> Tensor:
    """Return p(j | i), proportional to (1 + cosine of x_i and x_j) / 2 (probabilistic knowledge transfer, 2018).

    Args:
        x: `[..., L, d]`; a vector of length 0 has cosine 0 with all, and no gradient.
        eps: added to the lengths, as in the public code.
        rows: the rows to compute, by default all.

    Returns:
        `[..., L, L]`, or `[R, L]`, rows of sum 1; every vector is its own neighbor too.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x = x / (length.masked_fill(length == 0, math.inf) + eps)
    similarity = ((x[..., rows.index, :] @ x.mT + 1) / 2).clamp_min(0)  # opposite vectors round to less than -1
    return similarity / similarity.sum(dim=-1, keepdim=True)


def taylor_kernel(x: Tensor, gamma: float = 0.4, order: int = 2, rows: Rows = ALL_ROWS) -> Tensor:
    """Gaussian kernel of normalized vectors, as a Taylor series (correlation congruence, Peng et al., 2019).

    exp(-gamma |x_i - x_j|^2) = exp(-2 gamma) exp(2 gamma c) for the cosine c; the second factor is the sum of
    (2 gamma c)^p / p! over p = 0 .. `order`.

    Args:
        x: `[..., L, d]`; a vector of length 0 has cosine 0 with all.
        gamma: the kernel's rate of decay with the squared distance.
        order: P, the order of the series.
        rows: the rows to compute, by default all.

    Returns:
        `[..., L, L]`, or `[R, L]`.
    """
    x = _normalized(x, dim=-1)
    exponent = 2 * gamma * (x[..., rows.index, :] @ x.mT)
    series = torch.ones_like(exponent)
    for power in range(order, 0, -1):
        series = 1 + exponent / power * series
    return math.exp(-2 * gamma) * series


def channel_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels, with the kernel k(x, y) = (x . y)^2 (NST, Huang, Wang, 2017).

    A channel is the vector of its activations over the cells, normalized to length 1; with means over the pairs of
    channels, MMD^2 = mean k(s, s') + mean k(t, t') - 2 mean k(s, t). That is the squared difference of the second
    moments, mean s s^T and mean t t^T, and is computed from these if there are fewer cells than channels.

    Args:
        student: `[..., N, c]`, N cells.
        teacher: `[..., N, C]`.

    Returns:
        `[...]`, one value per image.
    """
    student, teacher = _normalized(student, dim=-2), _normalized(teacher, dim=-2)
    if student.shape[-2] <= max(student.shape[-1], teacher.shape[-1]):
        student_moment, teacher_moment = (x @ x.mT / x.shape[-1] for x in (student, teacher))
        return (student_moment - teacher_moment).square().sum(dim=(-2, -1))
    return _mean_kernel(student, student) + _mean_kernel(teacher, teacher) - 2 * _mean_kernel(student, teacher)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.mT @ y).square().mean(dim=(-2, -1))


def _normalized(x: Tensor, dim: int) -> Tensor:
    """Normalize like `torch.nn.functional.normalize`, but with gradient 0, not 1e12, at vectors of length 0."""
    length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length <= 1e-12, math.inf)
