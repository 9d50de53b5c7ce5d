"""Losses on correlations, and the congruence of adjacent samples in a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson correlation of two series, invariant (up to `eps`) to shifts and positive scales of either.

    If a series is constant up to rounding, the correlation is 0 with gradient 0.

    Args:
        x: `[..., n]`.
        y: `[..., n]`.
        eps: added to the product of both lengths, as in DIST's public code.

    Returns:
        `[...]`, between -1 and 1.
    """
    (x, flat_x), (y, flat_y) = _centered(x), _centered(y)
    product: Tensor = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1) + eps
    return (x * y).sum(dim=-1) / product.masked_fill(flat_x | flat_y, torch.inf)


def correlation_distance(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """DIST (Huang, You, Wang, Qian, Xu, 2022): `beta` (1 - inter) + `gamma` (1 - intra).

    inter is the mean correlation over the classes of a sample, intra the mean correlation over the samples of a class.

    Args:
        student: class probabilities `[B, K]`.
        teacher: class probabilities `[B, K]`.
        beta: weight of the relation between the classes of a sample.
        gamma: weight of the relation between the samples of a class.

    Returns:
        A scalar.
    """
    inter, intra = pearson(student, teacher).mean(), pearson(student.mT, teacher.mT).mean()
    return beta * (1 - inter) + gamma * (1 - intra)


def adjacent_congruence(student: Tensor, teacher: Tensor) -> Tensor:
    """The CRD benchmark's form of correlation congruence: mean_i sum_c |s - t|_ic |s - t|_(i+1)c.

    It multiplies each sample's deviation by that of the next sample, so it depends on the order of the batch.

    Args:
        student: `[B, d]`.
        teacher: `[B, d]`.

    Returns:
        A scalar, the mean over the B - 1 pairs of adjacent samples; 0 for a single sample.
    """
    deviation = (student - teacher).abs()
    return (deviation[:-1] * deviation[1:]).sum() / max(len(deviation) - 1, 1)


def _centered(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centered series, and whether it is constant up to rounding."""
    centered = x - x.mean(dim=-1, keepdim=True)
    noise = 4 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=-1)
    return centered, torch.linalg.vector_norm(centered.detach(), dim=-1) <= noise
