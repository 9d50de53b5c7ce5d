"""Connected pieces of label maps, and their repair: afterwards every label is one piece.

Pieces grow until nothing changes, which the host has to look up: on a GPU each sweep waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def connected_pieces(labels: Tensor) -> Tensor:
    """The pieces of each label that are connected along pixel edges.

    Args:
        labels: `[B, H, W]`, integers.

    Returns:
        `[B, H, W]` int64: of each pixel, the smallest index (row by row) of a pixel in the same piece.
    """
    index = torch.arange(labels[0].numel(), device=labels.device).view(labels.shape[1:])
    runs = [_run_starts(labels, index, dim).flatten(1) for dim in (1, 2)]
    pieces = index.flatten().expand(len(labels), -1)
    while True:
        joined = pieces
        for run in runs:
            with _in_any_order():
                joined = joined.scatter_reduce(1, run, joined, "amin").gather(1, run)
        joined = joined.gather(1, joined)  # what the pixel that is pointed to has heard of
        if torch.equal(joined, pieces):
            return pieces.view_as(labels)
        pieces = joined


def piece_sizes(pieces: Tensor) -> Tensor:
    """Of each pixel, how many are in its piece: `[B, N]` to `[B, N]`, for pieces as `connected_pieces` names them."""
    names = pieces + pieces.shape[1] * torch.arange(len(pieces), device=pieces.device).unsqueeze(1)
    return names.flatten().bincount(minlength=names.numel())[names]


def connect(labels: Tensor, colors: Tensor, centers: Tensor) -> Tensor:
    """Keep the largest piece of every label; the pixels of the others join the label beside them that looks most alike.

    Args:
        labels: `[B, H, W]` int64.
        colors: `[B, 3, H, W]`.
        centers: the labels' colors, `[B, K, 3]`.

    Returns:
        `[B, H, W]` int64, of the same labels, each of them connected.
    """
    pieces = connected_pieces(labels).flatten(1)
    owners, (batch, count) = labels.flatten(1), centers.shape[:2]
    pixels = pieces.shape[1]
    # One number for each piece that orders them by size and tells equal ones apart.
    order = piece_sizes(pieces) * pixels - pieces
    with _in_any_order():
        largest = order.new_zeros(batch, count).scatter_reduce(1, owners, order, "amax")
    kept = owners.where(order == largest.gather(1, owners), -1).view_as(labels)
    image, row, column = (kept < 0).nonzero(as_tuple=True)
    color = colors[image, :, row, column]
    framed = F.pad(kept, (1, 1, 1, 1), value=-1)
    places = (image * framed.shape[1] + row + 1) * framed.shape[2] + column + 1
    around = torch.tensor([1, -1, framed.shape[2], -framed.shape[2]], device=labels.device)
    framed = framed.flatten()
    while len(places):
        beside = framed[places.unsqueeze(1) + around]
        center = centers[image.unsqueeze(1), beside.clamp_min(0)]
        distance = (center - color.unsqueeze(1)).square().sum(dim=2).masked_fill(beside < 0, math.inf)
        chosen = beside.gather(1, distance.argmin(dim=1, keepdim=True)).squeeze(1)
        framed[places] = chosen  # still -1 where no label has come near
        waiting = chosen < 0
        places, image, color = places[waiting], image[waiting], color[waiting]
    return framed.view(batch, labels.shape[1] + 2, -1)[:, 1:-1, 1:-1].contiguous()


def _run_starts(labels: Tensor, index: Tensor, dim: int) -> Tensor:
    """Of each pixel, the index of the first pixel of the run of equal labels that it is in."""
    first = index.new_ones(labels.narrow(dim, 0, 1).shape, dtype=torch.bool)
    starts = torch.cat([first, labels.diff(dim=dim) != 0], dim=dim)
    return torch.where(starts, index, 0).cummax(dim=dim).values


@contextmanager
def _in_any_order() -> Iterator[None]:
    """Allow what deterministic mode refuses on a GPU: the least of some integers is the same in any order."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)
