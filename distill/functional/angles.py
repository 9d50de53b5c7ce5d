"""RKD's angles without a tensor of all triples: value and gradient in one pass over the vertices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.functional.relations import centered_gram, gram_distances

Edges = tuple[Tensor, Tensor, Tensor]
"""What the cosines of one network follow from: G, v and w, each `[..., L, L]`, see `edges`."""

AT_A_TIME = {"cpu": 2**17, "cuda": 2**24}
"""Cosines held at a time: on a CPU such a tensor stays in the cache, on a GPU it fills the device."""


def edges(x: Tensor) -> Edges:
    """The Gram matrix, the inverse lengths of all edges, and the offsets of their ends.

    The cosine of the angle at the vertex i between the edges to j and to k is::

        (x_j - x_i)(x_k - x_i) / (|x_j - x_i| |x_k - x_i|) = v_ij v_ik G_jk - w_ij v_ik - v_ij w_ik

    with G = x x^T, v_ij = 1 / |x_j - x_i| and w_ij = v_ij (G_ij - G_ii / 2).

    Args:
        x: tokens, `[..., L, d]`.

    Returns:
        G, v and w, `[..., L, L]`; v and w are 0 where two tokens are equal, so that all their cosines are.
    """
    gram = centered_gram(x)
    distances = gram_distances(gram)
    inverse = distances.masked_fill(distances == 0, math.inf).reciprocal()
    offset = gram - gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) / 2
    return gram, inverse, offset * inverse


def angle_difference(student: Edges, teacher: Edges) -> Tensor:
    """Mean Huber loss between the cosines of all triples, `huber(angle_cosines(s), angle_cosines(t))`.

    It holds the cosines of a few vertices at a time, the gradient included: memory grows with L^2, time with L^3.
    The gradient cannot be differentiated again, and the teacher has none.

    Args:
        student: edges of its tokens, `[..., L, L]`.
        teacher: edges of its tokens, `[..., L, L]`.

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
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(part) for part in (gram, inverse, offset)] if wanted else []
        most = AT_A_TIME.get(gram.device.type, AT_A_TIME["cuda"])
        step = max(1, most // max(gram.numel(), 1))
        for first in range(0, tokens, step):
            rows = slice(first, first + step)
            cosines = _cosines(gram, inverse[:, rows], offset[:, rows])
            difference = cosines - _cosines(teacher[0], teacher[1][:, rows], teacher[2][:, rows])
            slope = difference.clamp(-1, 1)
            total += torch.dot(slope.flatten(), difference.flatten()) - slope.square().sum() / 2
            if wanted:
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
    """`[n, c, L, L]` of c vertices: (v_ij G_jk - w_ij) v_ik - v_ij w_ik."""
    cosines = torch.addcmul(-offset.unsqueeze(-1), inverse.unsqueeze(-1), gram.unsqueeze(1))
    cosines *= inverse.unsqueeze(-2)
    return cosines.addcmul_(inverse.unsqueeze(-1), offset.unsqueeze(-2), value=-1)


def _add_gradients(
    gradients: list[Tensor], rows: slice, slope: Tensor, cosines: Tensor, inverse: Tensor, offset: Tensor
) -> None:
    """Add those of c vertices; `slope`, the derivative by the cosines, is symmetric in j and k, and is used up."""
    of_gram, of_inverse, of_offset = gradients
    weighted = (slope @ inverse.unsqueeze(-1)).squeeze(-1)
    of_offset[:, rows] = -2 * weighted
    # v_ij (d cosine / d v_ij) = cosine + w_ij v_ik
    by_length = 2 * (cosines.mul_(slope).sum(-1) + offset * weighted)
    of_inverse[:, rows] = by_length / inverse.masked_fill(inverse == 0, math.inf)
    of_gram += slope.mul_(inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2)).sum(1)
