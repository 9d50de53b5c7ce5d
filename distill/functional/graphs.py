"""Graphs of tokens: nearest neighbors, and how far two networks' graphs over the same nodes are apart.

Nodes are rows `[M, d]`. No `[M, M, d]` tensor is built. What is `[M, M]`, or `[M, k, d]` for k neighbors, can be
computed in chunks of its rows, which the backward pass computes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.contrast import info_nce
from distill.functional.divergences import kl_divergence


def nearest_neighbors(nodes: Tensor, neighbors: int, chunk: int | None = None) -> Tensor:
    """The k nearest other nodes of each, by Euclidean distance and without gradient; no approximation.

    Args:
        nodes: `[M, d]`.
        neighbors: k, below M.
        chunk: nodes for which they are looked up at a time; all if not given.

    Returns:
        int64 `[M, k]`, the nearest first.
    """
    nodes = nodes.detach()
    nodes = nodes - nodes.mean(dim=0)  # a far origin would cost the differences their digits
    squares = nodes.square().sum(dim=1)

    def look_up(rows: slice, nodes: Tensor, squares: Tensor) -> Tensor:
        # |a - b|^2 without |a|^2, which does not change the order of a row
        closeness = torch.addmm(squares, nodes[rows], nodes.T, alpha=-2)
        closeness.diagonal(rows.start).fill_(math.inf)  # no node is its own neighbor
        return closeness.topk(neighbors, largest=False).indices

    return _by_rows(look_up, chunk, nodes, squares)


def neighbor_distances(nodes: Tensor, places: Tensor, chunk: int | None = None) -> Tensor:
    """Squared Euclidean distances from each node to its neighbors, exactly 0 between equal nodes.

    Args:
        nodes: `[M, d]`.
        places: int64 `[M, k]`, the neighbors of each.
        chunk: nodes computed at a time; all if not given.

    Returns:
        `[M, k]`.
    """

    def measure(rows: slice, nodes: Tensor, places: Tensor) -> Tensor:
        return (nodes[rows].unsqueeze(1) - nodes[places[rows]]).square().sum(dim=-1)

    return _by_rows(measure, chunk, nodes, places)


def neighbor_divergence(
    student: Tensor, teacher: Tensor, neighbors: int, sigma: float | None = None, chunk: int | None = None
) -> Tensor:
    """KL(teacher || student) between the nodes' distributions over their teacher's neighbors.

    With d_ij the distance of node i to node j, one of the k nearest of i in the teacher, a network's distribution is
    softmax_j(-d_ij^2 / 2 sigma).

    Args:
        student: `[M, d_s]`.
        teacher: `[M, d_t]`, the same nodes.
        neighbors: k, below M; with 1 the divergence is always 0.
        sigma: the scale of the squared distances; if not given, each network's mean over all nodes and neighbors,
            through which gradient passes.
        chunk: nodes computed at a time; all if not given.

    Returns:
        `[M]`.
    """
    places = nearest_neighbors(teacher, neighbors, chunk)
    exponents = [_exponents(neighbor_distances(nodes, places, chunk), sigma) for nodes in (student, teacher)]
    return kl_divergence(exponents[0], exponents[1])


def adjacency_divergence(
    student: Tensor, teacher: Tensor, neighbors: int, sigma: float | None = None, chunk: int | None = None
) -> Tensor:
    """KL(student || teacher) between the rows of both adjacency matrices, each row a softmax over all nodes.

    A_ij = exp(-d_ij^2 / 2 sigma) for the k nearest j of i in the network itself, 0 for all others, whose exponential is
    1: with many nodes all rows are nearly uniform, and the divergence says little. It is the form that TRG's summaries
    print. Only the k entries of a row that are not 0 are computed.

    Args:
        student: `[M, d_s]`.
        teacher: `[M, d_t]`, the same nodes.
        neighbors: k, below M.
        sigma: as for `neighbor_divergence`.
        chunk: as there.

    Returns:
        `[M]`.
    """
    places = [nearest_neighbors(nodes, neighbors, chunk) for nodes in (student, teacher)]
    own, other = (
        _exponents(neighbor_distances(nodes, found, chunk), sigma).exp()
        for nodes, found in zip((student, teacher), places, strict=True)
    )
    # log sum_j exp A_ij = log M + excess: with the log M left out, small divergences keep their digits
    own_excess, other_excess = (
        (edges.expm1().sum(dim=1, keepdim=True) / len(student)).log1p() for edges in (own, other)
    )
    same = places[0].unsqueeze(2) == places[1].unsqueeze(1)
    own_at_other = (own.unsqueeze(2) * same).sum(dim=1)  # the student's edges to the teacher's neighbors
    cross = (own - own_excess).exp() * own, (own_at_other - own_excess).exp() * other
    expected = (cross[0] - cross[1]).sum(dim=1) / len(student)
    return expected - (own_excess - other_excess).squeeze(1)


def node_contrast(anchors: Tensor, keys: Tensor, temperature: float, chunk: int | None = None) -> Tensor:
    """InfoNCE of each anchor among all keys, the positive being the key of the same row.

    Args:
        anchors: `[M, d]`, at length 1.
        keys: `[M, d]`, at length 1.
        temperature: divides their dot products.
        chunk: anchors computed at a time; all if not given.

    Returns:
        `[M]`.
    """

    def contrast(rows: slice, anchors: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
        return info_nce(anchors[rows] @ keys.T, positive[rows])

    return _by_rows(contrast, chunk, anchors / temperature, keys, torch.arange(len(anchors), device=anchors.device))


def context_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between both networks' softmax(F F^T / sqrt(d)) among the tokens of each image.

    Args:
        student: F, `[B, N, d_s]`.
        teacher: `[B, N, d_t]`, the same places.

    Returns:
        A scalar, the mean over B N^2 entries: it falls with 1 / N^2 as the rows of more tokens have smaller entries.
    """
    own, other = ((tokens @ tokens.mT / math.sqrt(tokens.shape[-1])).softmax(dim=-1) for tokens in (student, teacher))
    return F.mse_loss(own, other)


def edge_similarities(squared: Tensor, sigma: float | None = None) -> Tensor:
    """What the edges of a graph weigh: exp(-d^2 / 2 sigma), from 0 to 1.

    Args:
        squared: squared distances of any shape.
        sigma: their scale; their mean if not given.
    """
    return _exponents(squared, sigma).exp()


def _exponents(squared: Tensor, sigma: float | None) -> Tensor:
    if sigma is not None:
        return squared / (-2 * sigma)
    mean = squared.mean()
    return squared / (-2 * mean.masked_fill(mean == 0, 1.0))  # 0 where all neighbors are equal


def _by_rows(function: Callable[..., Tensor], chunk: int | None, *tensors: Tensor) -> Tensor:
    """`function(rows, *tensors)` for all rows of the first tensor, or for a chunk of them at a time."""
    if chunk is None or chunk >= len(tensors[0]):
        return function(slice(0, len(tensors[0])), *tensors)
    result: Tensor = _InChunks.apply(function, chunk, *tensors)
    return result


class _InChunks(torch.autograd.Function):
    """Keeps the results alone and computes again for the backward pass, as checkpointing does.

    (`torch.utils.checkpoint` loads torch's compiler when it is first called, and a backward pass with a gradient of its
    own loads sympy: each takes seconds.)
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], chunk: int, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.parts = [slice(start, start + chunk) for start in range(0, len(tensors[0]), chunk)]
        ctx.save_for_backward(*tensors)
        return torch.cat([function(part, *tensors) for part in ctx.parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad():
            for part in ctx.parts:
                torch.autograd.backward((ctx.function(part, *leaves) * gradients[0][part]).sum())
        return None, None, *(leaf.grad for leaf in leaves)
