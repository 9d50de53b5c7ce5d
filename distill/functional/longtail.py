"""Adjustments of logits and weights to class frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_priors(counts: Tensor) -> Tensor:
    """Return the logarithm of each class's share of the training images, `[K]`, from counts `[K]` above 0."""
    return (counts / counts.sum()).log()


def label_margins(counts: Tensor, largest: float = 0.5) -> Tensor:
    """Return the margins of LDAM (Cao et al. 2019), Delta_c proportional to n_c^(-1/4).

    Args:
        counts: n, `[K]`, above 0.
        largest: the margin of the rarest class.

    Returns:
        `[K]`.
    """
    margins = counts.pow(-0.25)
    return largest * margins / margins.amax()


def effective_number_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Return class weights by the effective number of samples, (1 - beta) / (1 - beta^n_c) (Cui et al. 2019).

    Args:
        counts: n, `[K]`, above 0.
        beta: from 0, equal weights, to below 1; towards 1, weights approach 1 / n_c.

    Returns:
        `[K]`, of mean 1.
    """
    if beta == 0:
        return torch.ones_like(counts)
    weights = -1 / torch.expm1(counts * math.log(beta))  # 1 - beta cancels in the mean
    return weights / weights.mean()


def with_margins(logits: Tensor, label: Tensor, margins: Tensor, scale: float = 30.0) -> Tensor:
    """Return logits with the target's margin subtracted, as LDAM's cross-entropy uses them.

    s (z_c - Delta_c) for c = y, s z_c for the others.

    Args:
        logits: z, `[B, K]`.
        label: y, a class, int64 `[B]`, or soft `[B, K]`: each class's margin is then weighted by its share in the row.
        margins: Delta, `[K]`.
        scale: s.

    Returns:
        `[B, K]`.
    """
    if label.ndim == 1:
        share = (label.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    else:
        mass = label.sum(dim=1, keepdim=True)
        share = label / mass.masked_fill(mass == 0, 1.0)
    return scale * (logits - share * margins)
