"""Normalized differences between the vertices of two views, and how much they differ between networks: VRM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import ALL_ROWS, Rows
from distill.functional.chunks import by_rows, rows_per_chunk

Huber = Literal["huber", "discard"]
Edges = Literal["cross", "all"]
Classes = Literal["cross", "stacked"]


def edge_difference(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    kept: Tensor | None = None,
    delta: float = 1.0,
    form: Huber = "huber",
    chunk: int | None = None,
    rows: Rows = ALL_ROWS,
) -> Tensor:
    """Mean Huber loss between both networks' edges, the normalized differences of vertices.

    The edge from vertex m of one set to n of the other is (x_m - y_n) / |x_m - y_n|, a vector; that between equal
    vertices is 0. The mean runs over the edges and their entries.

    Memory holds the edges of `chunk` vertices at a time, in the backward pass too. The teacher gets no gradient.

    Args:
        student: both sets of vertices, `[M, d]` and `[N, d]`.
        teacher: likewise.
        kept: bool `[M, N]`, the edges that count; by default all.
        delta: the largest difference with a squared loss.
        form: beyond `delta`, `huber` goes on as a line, and `discard` is 0.
        chunk: vertices of the first set computed at a time; by default as many as give 4 million numbers, 32 on a GPU.
        rows: the vertices of the first set whose edges this rank computes; by default all.

    Returns:
        A scalar; 0 if no edge counts. With `rows`, this rank's share.
    """
    (first, second), targets = student, [part.detach() for part in teacher]
    weights = first.new_ones(len(first), len(second)) if kept is None else kept.to(first)
    count = (weights.sum() * first.shape[-1]).clamp_min(1)
    parts = [first[rows.index], second, targets[0][rows.index], targets[1], weights[rows.index]]

    def sums(part: slice, x: Tensor, y: Tensor, target_x: Tensor, target_y: Tensor, weight: Tensor) -> Tensor:
        found, wanted = _edges(x[part], y), _edges(target_x[part], target_y)
        loss = F.huber_loss(found, wanted, delta=delta, reduction="none")
        if form == "discard":
            loss = loss.masked_fill((found - wanted).detach().abs() > delta, 0.0)
        return (loss.sum(-1) * weight[part]).sum(-1)

    size = rows_per_chunk(second.numel(), second.device, chunk)
    return rows.ranks * by_rows(sums, size, *parts).sum() / count


def sample_edge_difference(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    unreliable: Sequence[Tensor],
    edges: Edges = "cross",
    prune: float = 0.0,
    delta: float = 1.0,
    form: Huber = "huber",
    chunk: int | None = None,
    rows: Rows = ALL_ROWS,
) -> Tensor:
    """Difference of the edges between samples, without those that are least reliable.

    Args:
        student: scores of a real and of a virtual view, `[B, K]` each.
        teacher: likewise.
        unreliable: how unreliable a sample is in each view, `[B]`; an edge is as unreliable as both its ends together.
        edges: between all real and all virtual samples, `cross`, or between each two of the 2 B, `all`.
        prune: the share of the edges, rounded down to a number, that is left out.
        delta: see `edge_difference`.
        form: likewise.
        chunk: likewise.
        rows: likewise; which edges count is found out on every rank.
    """
    sets = [(part[0], part[1]) for part in (student, teacher, unreliable)]
    if edges == "all":
        sets = [(both, both) for both in map(_together, sets)]
    ends, targets, doubts = sets
    doubt = doubts[0].unsqueeze(1) + doubts[1]
    candidates = torch.ones_like(doubt, dtype=torch.bool)
    candidates = candidates if edges == "cross" else candidates.triu(1)
    samples = len(student[0])
    count = samples**2 if edges == "cross" else samples * (2 * samples - 1)
    order = doubt.masked_fill(~candidates, -torch.inf).flatten().sort(descending=True, stable=True).indices
    kept = candidates.flatten().index_fill(0, order[: int(prune * count)], False).view_as(candidates)
    return edge_difference(ends, targets, kept, delta, form, chunk, rows)


def class_edge_difference(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    classes: Classes = "cross",
    delta: float = 1.0,
    form: Huber = "huber",
    chunk: int | None = None,
) -> Tensor:
    """Difference of the edges between classes, whose vertices are the columns of the scores.

    Args:
        student: scores of a real and of a virtual view, `[B, K]` each.
        teacher: likewise.
        classes: edges in R^B between all real and all virtual columns, `cross`, or in R^2B between each two columns of
            both views together, `stacked`.
        delta: see `edge_difference`.
        form: likewise.
        chunk: likewise.
    """
    if classes == "cross":
        ends, targets = (student[0].mT, student[1].mT), (teacher[0].mT, teacher[1].mT)
        return edge_difference(ends, targets, None, delta, form, chunk)
    column, target = torch.cat(list(student)).mT, torch.cat(list(teacher)).mT
    kept = torch.ones(len(column), len(column), dtype=torch.bool, device=column.device).triu(1)
    return edge_difference((column, column), (target, target), kept, delta, form, chunk)


def _together(views: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(views)


def _edges(first: Tensor, second: Tensor) -> Tensor:
    """Return the normalized differences `[m, N, d]`, 0 with gradient 0 between equal vertices."""
    difference = first.unsqueeze(1) - second
    squared = difference.square().sum(-1, keepdim=True)
    is_edge = squared > _SHORTEST**2
    return difference * squared.where(is_edge, 1.0).rsqrt().where(is_edge, 0.0)


_SHORTEST = 1e-12
"""Length up to which two vertices count as equal."""
