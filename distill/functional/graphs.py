"""Graphs of tokens: nearest neighbors, and divergences between two networks' graphs over the same nodes.

Nodes are rows `[M, d]`. No `[M, M, d]` tensor is built. Tensors of shape `[M, M]`, or `[M, k, d]` for k neighbors, are
computed in chunks of rows, which the backward pass recomputes, unless they are small. With `rows`, a function computes
the values of this rank's nodes, A of the M of all ranks, and all ranks call it together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import ALL_ROWS, Rows
from distill.functional.chunks import by_rows, rows_per_chunk
from distill.functional.contrast import info_nce
from distill.functional.divergences import kl_divergence


def nearest_neighbors(nodes: Tensor, neighbors: int, chunk: int | None = None, rows: Rows = ALL_ROWS) -> Tensor:
    """Return the exact k nearest other nodes of each node by Euclidean distance, without gradient.

    Args:
        nodes: `[M, d]`.
        neighbors: k, below M.
        chunk: nodes computed at a time; by default as many as make 4 million distances, 32 million on a GPU.
        rows: the nodes whose neighbors are returned, by default all.

    Returns:
        int64 `[A, k]`, the nearest first.
    """
    nodes = nodes.detach()
    nodes = nodes - nodes.mean(dim=0)  # a distant origin would cost digits of the differences
    squares = nodes.square().sum(dim=1)

    def nearest(part: slice, anchors: Tensor, numbers: Tensor, nodes: Tensor, squares: Tensor) -> Tensor:
        # |a - b|^2 without |a|^2, which does not change the order of a row
        closeness = torch.addmm(squares, anchors[part], nodes.T, alpha=-2)
        closeness.scatter_(1, numbers[part].unsqueeze(1), math.inf)  # no node is its own neighbor
        return closeness.topk(neighbors, largest=False).indices

    size = rows_per_chunk(len(nodes), nodes.device, chunk)
    return by_rows(nearest, size, nodes[rows.index], _numbers(nodes, rows), nodes, squares)


def neighbor_distances(nodes: Tensor, neighbors: Tensor, chunk: int | None = None, rows: Rows = ALL_ROWS) -> Tensor:
    """Return squared Euclidean distances from each node to its neighbors, exactly 0 between equal nodes.

    Args:
        nodes: `[M, d]`.
        neighbors: int64 `[A, k]`, the neighbors of each node.
        chunk: nodes computed at a time; by default as many as make 4 million numbers, 32 million on a GPU.
        rows: the nodes, by default all.

    Returns:
        `[A, k]`.
    """

    def distances(part: slice, anchors: Tensor, nodes: Tensor, neighbors: Tensor) -> Tensor:
        near = neighbors[part]
        targets = nodes.index_select(0, near.flatten()).view(
            *near.shape, nodes.shape[1]
        )  # its backward is an index_add
        difference = anchors[part].unsqueeze(1) - targets
        squares: Tensor = torch.linalg.vecdot(difference, difference)
        return squares

    size = rows_per_chunk(neighbors.shape[1] * nodes.shape[1], nodes.device, chunk)
    return by_rows(distances, size, nodes[rows.index], nodes, neighbors)


def neighbor_divergence(
    student: Tensor,
    teacher: Tensor,
    neighbors: int,
    sigma: float | None = None,
    chunk: int | None = None,
    rows: Rows = ALL_ROWS,
) -> Tensor:
    """KL(teacher || student) between the nodes' distributions over their teacher's neighbors.

    With d_ij the distance of node i to node j, one of the k nearest of i in the teacher, a network's distribution is
    softmax_j(-d_ij^2 / 2 sigma).

    Args:
        student: `[M, d_s]`.
        teacher: `[M, d_t]`, the same nodes.
        neighbors: k, below M; with 1 the divergence is always 0.
        sigma: the scale of the squared distances; by default each network's mean over all nodes and neighbors, through
            which gradient passes.
        chunk: nodes computed at a time; by default as many as make 4 million numbers, 32 million on a GPU.
        rows: the nodes whose divergences are returned, by default all.

    Returns:
        `[A]`.
    """
    nearest = nearest_neighbors(teacher, neighbors, chunk, rows)
    exponents = [
        _exponents(neighbor_distances(nodes, nearest, chunk, rows), sigma, rows) for nodes in (student, teacher)
    ]
    return kl_divergence(exponents[0], exponents[1])


def adjacency_divergence(
    student: Tensor,
    teacher: Tensor,
    neighbors: int,
    sigma: float | None = None,
    chunk: int | None = None,
    rows: Rows = ALL_ROWS,
) -> Tensor:
    """KL(student || teacher) between the rows of both adjacency matrices, each row a softmax over all nodes.

    A_ij = exp(-d_ij^2 / 2 sigma) for the k nearest j of i in the network itself, and 0 for all others, whose
    exponential is 1: with many nodes all rows are nearly uniform, and the divergence carries little signal. It is the
    form printed in TRG's summaries. Only the k non-zero entries of a row are computed.

    Args:
        student: `[M, d_s]`.
        teacher: `[M, d_t]`, the same nodes.
        neighbors: k, below M.
        sigma: as for `neighbor_divergence`.
        chunk: likewise.
        rows: likewise.

    Returns:
        `[A]`.
    """
    nearest = [nearest_neighbors(nodes, neighbors, chunk, rows) for nodes in (student, teacher)]
    student_edges, teacher_edges = (
        _exponents(neighbor_distances(nodes, targets, chunk, rows), sigma, rows).exp()
        for nodes, targets in zip((student, teacher), nearest, strict=True)
    )
    # log sum_j exp A_ij = log M + excess: without log M, small divergences keep their digits
    student_excess, teacher_excess = (
        (edges.expm1().sum(dim=1, keepdim=True) / len(student)).log1p() for edges in (student_edges, teacher_edges)
    )
    same = nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)
    student_to_teachers = (student_edges.unsqueeze(2) * same).sum(dim=1)  # the student's edges to teacher's neighbors
    entropy = (student_edges - student_excess).exp() * student_edges
    cross = (student_to_teachers - student_excess).exp() * teacher_edges
    expected = (entropy - cross).sum(dim=1) / len(student)
    return expected - (student_excess - teacher_excess).squeeze(1)


def node_contrast(
    anchors: Tensor, keys: Tensor, temperature: float, chunk: int | None = None, rows: Rows = ALL_ROWS
) -> Tensor:
    """InfoNCE of each anchor among all keys, with the key of the same node as its positive.

    Args:
        anchors: `[A, d]`, of length 1, by default of all M nodes.
        keys: `[M, d]`, of length 1.
        temperature: divisor of the dot products.
        chunk: anchors computed at a time; by default as many as make 4 million products, 32 million on a GPU.
        rows: the nodes of the anchors.

    Returns:
        `[A]`.
    """

    def contrast(part: slice, anchors: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
        return info_nce(anchors[part] @ keys.T, positive[part])

    size = rows_per_chunk(len(keys), keys.device, chunk)
    return by_rows(contrast, size, anchors / temperature, keys, _numbers(keys, rows))


def context_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between both networks' softmax(F F^T / sqrt(d)) among the tokens of each image.

    Args:
        student: F, `[B, N, d_s]`.
        teacher: `[B, N, d_t]`, at the same positions.

    Returns:
        A scalar, the mean over B N^2 entries: it falls with 1 / N^2, since rows of more tokens have smaller entries.
    """
    attention = [(tokens @ tokens.mT / math.sqrt(tokens.shape[-1])).softmax(dim=-1) for tokens in (student, teacher)]
    return F.mse_loss(attention[0], attention[1])


def edge_similarities(squared: Tensor, sigma: float | None = None) -> Tensor:
    """Return the weights of a graph's edges, exp(-d^2 / 2 sigma), between 0 and 1.

    Args:
        squared: squared distances of any shape.
        sigma: their scale; by default their mean.
    """
    return _exponents(squared, sigma).exp()


def _exponents(squared: Tensor, sigma: float | None, rows: Rows = ALL_ROWS) -> Tensor:
    if sigma is not None:
        return squared / (-2 * sigma)
    mean = rows.mean(squared)
    return squared / (-2 * mean.masked_fill(mean == 0, 1.0))  # 0 if all neighbors are equal


def _numbers(nodes: Tensor, rows: Rows) -> Tensor:
    """Return the numbers of the own nodes among all, int64 `[A]`."""
    return torch.arange(len(nodes), device=nodes.device)[rows.index]
