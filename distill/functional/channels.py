"""Correlations among the channels of one network's map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.functional.kernels import normalized_gram


def channel_correlation_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """ICKD (Liu et al., 2021): `1/d sum_c |G_s,c / |G_s,c| - G_t,c / |G_t,c||^2`, the mean over the batch.

    G = F F^T is the Gram matrix `[d, d]` of the channels of one image's map F `[d, h * w]`, and G_c one of its rows. If
    a map has fewer cells than channels, the rows are compared without computing G. A row of zeros stays 0.

    Args:
        student: `[B, d, h, w]`.
        teacher: `[B, d, h', w']`; the grids may differ.

    Returns:
        A scalar.
    """
    student, teacher = student.flatten(2), teacher.flatten(2)
    channels = student.shape[1]
    if max(student.shape[2], teacher.shape[2]) >= channels:
        difference = (normalized_gram(student) - normalized_gram(teacher)).square().sum(dim=-1)
    else:
        (student_length, student_norm), (teacher_length, teacher_norm) = _row_lengths(student), _row_lengths(teacher)
        cosine = _products(student, teacher) / student_length / teacher_length
        difference = student_norm + teacher_norm - 2 * cosine
    return difference.mean()


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products of the rows of x x^T and y y^T, `[B, d]`, from maps `[B, d, N]` and `[B, d, N']`."""
    return ((x @ (x.mT @ y)) * y).sum(dim=-1)


def _row_lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lengths of the rows of x x^T, infinite for 0, and their lengths once normalized, 1 or 0; `[B, d]`."""
    squared = _products(x, x)
    present = squared > 1e-24
    length = torch.where(present, squared, 1.0).sqrt().masked_fill(~present, math.inf)
    return length, present.to(x.dtype)
