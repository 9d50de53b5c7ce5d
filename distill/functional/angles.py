"""RKD's angle loss without a tensor of all triples: value and gradient in one pass over the vertices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.distributed import ALL_ROWS, Rows
from distill.functional.relations import centered_gram, row_distances

Edges = tuple[Tensor, Tensor, Tensor]
"""G, v and w of one network, each `[..., L, L]`, from which all cosines follow; see `edges`.

Of R vertices, v and w are `[R, L]`.
"""

COSINES_PER_CHUNK = {"cpu": 2**17, "cuda": 2**24}
"""Cosines per chunk, by device type: few enough for a CPU's cache, enough to fill a GPU."""


def edges(x: Tensor, present: Tensor | None = None, rows: Rows = ALL_ROWS) -> Edges:
    """Return the Gram matrix, the inverse lengths of all edges, and the offsets of their ends.

    The cosine of the angle at the vertex i between the edges to j and to k is::

        (x_j - x_i)(x_k - x_i) / (|x_j - x_i| |x_k - x_i|) = v_ij v_ik G_jk - w_ij v_ik - v_ij w_ik

    with G = x x^T, v_ij = 1 / |x_j - x_i| and w_ij = v_ij (G_ij - G_ii / 2).

    Args:
        x: tokens, `[..., L, d]`.
        present: bool `[..., L]`, by default all.
        rows: the vertices, by default all.

    Returns:
        G, v and w, `[..., L, L]`, v and w of the vertices only; v and w, and hence all cosines, are 0 if two tokens are
        equal or one is absent.
    """
    gram = centered_gram(x)
    return edges_of(gram, row_distances(gram, present, rows), rows)


def edges_of(gram: Tensor, distances: Tensor, rows: Rows = ALL_ROWS) -> Edges:
    """Return what `edges` does, given the Gram matrix `[..., L, L]` of centered tokens and the distances.

    Args:
        gram: of all tokens.
        distances: of the vertices to all tokens, as `row_distances` returns them.
        rows: the vertices, by default all.
    """
    inverse = distances.masked_fill(distances == 0, math.inf).reciprocal()
    own_squares = gram.diagonal(dim1=-2, dim2=-1)[..., rows.index]
    return gram, inverse, (gram[..., rows.index, :] - own_squares.unsqueeze(-1) / 2) * inverse


def angle_difference(student: Edges, teacher: Edges, present: Tensor | None = None) -> Tensor:
    """Mean Huber loss between the cosines of all triples, `huber(angle_cosines(s), angle_cosines(t))`.

    With `present`, the mean runs over the triples of present tokens of each set of tokens, and then over the sets.

    Only the cosines of a few vertices exist at a time, in the backward pass too: memory grows with L^2, time with L^3.
    Of R vertices, the mean runs over the R L^2 triples at them, and time grows with R L^2. The gradient cannot be
    differentiated again, and the teacher gets none.

    Args:
        student: edges of the student's tokens, of all or of some vertices.
        teacher: edges of the teacher's tokens, of the same vertices.
        present: bool `[..., L]`, by default all; both edges must have been made with it.

    Returns:
        A scalar.
    """
    weights = None
    if present is not None:
        weights = (present.sum(dim=-1).clamp_min(1).to(student[0].dtype) ** -3).flatten() / present[..., 0].numel()
    loss: Tensor = _AngleDifference.apply(weights, *student, *teacher)
    return loss


class _AngleDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor | None, *edges: Tensor) -> Tensor:
        tokens, vertices = edges[0].shape[-1], edges[1].shape[-2]
        gram, inverse, offset, *teacher = (part.reshape(-1, *part.shape[-2:]) for part in edges)
        total = gram.new_zeros(())
        needs_gradient = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(part) for part in (gram, inverse, offset)] if needs_gradient else []
        for sets, rows in _chunks(len(gram), vertices, tokens, gram.device):
            cosines = _cosines(gram[sets], inverse[sets, rows], offset[sets, rows])
            difference = cosines - _cosines(teacher[0][sets], teacher[1][sets, rows], teacher[2][sets, rows])
            slope = difference.clamp(-1, 1)
            difference -= slope / 2  # the Huber loss is slope * (difference - slope / 2)
            if weights is not None:
                slope *= weights[sets].view(-1, 1, 1, 1)
            total += torch.dot(slope.flatten(), difference.flatten())
            if needs_gradient:
                parts = [part[sets] for part in gradients]
                _add_gradients(parts, rows, slope, cosines, inverse[sets, rows], offset[sets, rows])
        ctx.save_for_backward(*(part.reshape(edge.shape) for part, edge in zip(gradients, edges, strict=False)))
        ctx.count = inverse.numel() * tokens if weights is None else 1
        mean: Tensor = total / ctx.count
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradient / ctx.count
        return None, *(scale * part for part in ctx.saved_tensors), None, None, None


def _chunks(sets: int, vertices: int, tokens: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the sets of tokens and of their vertices, with as many cosines as fit into a chunk."""
    limit = COSINES_PER_CHUNK.get(device.type, COSINES_PER_CHUNK["cuda"])
    together = min(sets, max(1, limit // max(tokens**2, 1)))
    at_a_time = max(1, limit // max(together * tokens**2, 1))
    for first_set in range(0, sets, max(together, 1)):
        for first in range(0, vertices, at_a_time):
            yield slice(first_set, first_set + together), slice(first, first + at_a_time)


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
