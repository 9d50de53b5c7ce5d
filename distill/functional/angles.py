"""RKD's angle loss without a tensor of all triples: value and gradient in one pass over the vertices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.functional.relations import centered_gram, gram_distances

Edges = tuple[Tensor, Tensor, Tensor]
"""G, v and w of one network, each `[..., L, L]`, from which all cosines follow; see `edges`."""

COSINES_PER_CHUNK = {"cpu": 2**17, "cuda": 2**24}
"""Cosines per chunk, by device type: few enough for a CPU's cache, enough to fill a GPU."""


def edges(x: Tensor) -> Edges:
    """Return the Gram matrix, the inverse lengths of all edges, and the offsets of their ends.

    The cosine of the angle at the vertex i between the edges to j and to k is::

        (x_j - x_i)(x_k - x_i) / (|x_j - x_i| |x_k - x_i|) = v_ij v_ik G_jk - w_ij v_ik - v_ij w_ik

    with G = x x^T, v_ij = 1 / |x_j - x_i| and w_ij = v_ij (G_ij - G_ii / 2).

    Args:
        x: tokens, `[..., L, d]`.

    Returns:
        G, v and w, `[..., L, L]`; v and w, and hence all cosines, are 0 if two tokens are equal.
    """
    gram = centered_gram(x)
    distances = gram_distances(gram)
    inverse = distances.masked_fill(distances == 0, math.inf).reciprocal()
    offset = gram - gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) / 2
    return gram, inverse, offset * inverse


def angle_difference(student: Edges, teacher: Edges) -> Tensor:
    """Mean Huber loss between the cosines of all triples, `huber(angle_cosines(s), angle_cosines(t))`.

    Only the cosines of a few vertices exist at a time, in the backward pass too: memory grows with L^2, time with L^3.
    The gradient cannot be differentiated again, and the teacher gets none.

    Args:
        student: edges of the student's tokens, `[..., L, L]`.
        teacher: edges of the teacher's tokens, `[..., L, L]`.

    Returns:
        A scalar.
    """
    loss: Tensor = _AngleDifference.apply(*student, *teacher)
    return loss


class _AngleDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *edges: Tensor) -> Tensor:
        tokens = edges[0].shape[-1]
        gram, inverse, offset, *teacher = (part.reshape(-1, tokens, tokens) for part in edges)
        total = gram.new_zeros(())
        needs_gradient = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(part) for part in (gram, inverse, offset)] if needs_gradient else []
        limit = COSINES_PER_CHUNK.get(gram.device.type, COSINES_PER_CHUNK["cuda"])
        step = max(1, limit // max(gram.numel(), 1))
        for first in range(0, tokens, step):
            rows = slice(first, first + step)
            cosines = _cosines(gram, inverse[:, rows], offset[:, rows])
            difference = cosines - _cosines(teacher[0], teacher[1][:, rows], teacher[2][:, rows])
            slope = difference.clamp(-1, 1)
            total += torch.dot(slope.flatten(), difference.flatten()) - slope.square().sum() / 2
            if needs_gradient:
                _add_gradients(gradients, rows, slope, cosines, inverse[:, rows], offset[:, rows])
        ctx.save_for_backward(*(part.reshape(edges[0].shape) for part in gradients))
        ctx.count = gram.numel() * tokens
        return total / (gram.numel() * tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradient / ctx.count
        return *(scale * part for part in ctx.saved_tensors), None, None, None


def _cosines(gram: Tensor, inverse: Tensor, offset: Tensor) -> Tensor:
    """Return the cosines of c vertices, `[n, c, L, L]`: (v_ij G_jk - w_ij) v_ik - v_ij w_ik."""
    cosines = torch.addcmul(-offset.unsqueeze(-1), inverse.unsqueeze(-1), gram.unsqueeze(1))
    cosines *= inverse.unsqueeze(-2)
    return cosines.addcmul_(inverse.unsqueeze(-1), offset.unsqueeze(-2), value=-1)


def _add_gradients(
    gradients: list[Tensor], rows: slice, slope: Tensor, cosines: Tensor, inverse: Tensor, offset: Tensor
) -> None:
    """Add the gradients of c vertices; `slope`, the derivative by the cosines (symmetric in j, k), is overwritten."""
    of_gram, of_inverse, of_offset = gradients
    weighted = (slope @ inverse.unsqueeze(-1)).squeeze(-1)
    of_offset[:, rows] = -2 * weighted
    # v_ij (d cosine / d v_ij) = cosine + w_ij v_ik
    by_length = 2 * (cosines.mul_(slope).sum(-1) + offset * weighted)
    of_inverse[:, rows] = by_length / inverse.masked_fill(inverse == 0, math.inf)
    of_gram += slope.mul_(inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2)).sum(1)
