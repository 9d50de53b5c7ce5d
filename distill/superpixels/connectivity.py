"""Connected components of label maps, and their repair so that every label is connected.

Components grow until nothing changes, which the host has to check: on a GPU each sweep synchronizes with the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def connected_components(labels: Tensor) -> Tensor:
    """Return the components of each label that are connected along pixel edges.

    Args:
        labels: `[B, H, W]`, integers.

    Returns:
        `[B, H, W]` int64: for each pixel, the smallest index (row by row) of a pixel in the same component.
    """
    index = torch.arange(labels[0].numel(), device=labels.device).view(labels.shape[1:])
    runs = [_run_starts(labels, index, dim).flatten(1) for dim in (1, 2)]
    components = index.flatten().expand(len(labels), -1)
    while True:
        joined = components
        for run in runs:
            with _in_any_order():
                joined = joined.scatter_reduce(1, run, joined, "amin").gather(1, run)
        joined = joined.gather(1, joined)  # follow the pointer of the pixel pointed to
        if torch.equal(joined, components):
            return components.view_as(labels)
        components = joined


def component_sizes(components: Tensor) -> Tensor:
    """Return the size of each pixel's component, `[B, N]` to `[B, N]`, for the result of `connected_components`."""
    unique = components + components.shape[1] * torch.arange(len(components), device=components.device).unsqueeze(1)
    return unique.flatten().bincount(minlength=unique.numel())[unique]


def connect(labels: Tensor, colors: Tensor, centers: Tensor) -> Tensor:
    """Keep the largest component of every label; other pixels join the adjacent label with the most similar color.

    Args:
        labels: `[B, H, W]` int64.
        colors: `[B, 3, H, W]`.
        centers: mean color of each label, `[B, K, 3]`.

    Returns:
        `[B, H, W]` int64, with the same labels, each of them connected.
    """
    components = connected_components(labels).flatten(1)
    owners, (batch, count) = labels.flatten(1), centers.shape[:2]
    pixels = components.shape[1]
    # One number per component that orders components by size and is unique.
    order = component_sizes(components) * pixels - components
    with _in_any_order():
        largest = order.new_zeros(batch, count).scatter_reduce(1, owners, order, "amax")
    kept = owners.where(order == largest.gather(1, owners), -1).view_as(labels)
    image, row, column = (kept < 0).nonzero(as_tuple=True)
    color = colors[image, :, row, column]
    framed = F.pad(kept, (1, 1, 1, 1), value=-1)
    positions = (image * framed.shape[1] + row + 1) * framed.shape[2] + column + 1
    around = torch.tensor([1, -1, framed.shape[2], -framed.shape[2]], device=labels.device)
    framed = framed.flatten()
    while len(positions):
        beside = framed[positions.unsqueeze(1) + around]
        center = centers[image.unsqueeze(1), beside.clamp_min(0)]
        distance = (center - color.unsqueeze(1)).square().sum(dim=2).masked_fill(beside < 0, math.inf)
        chosen = beside.gather(1, distance.argmin(dim=1, keepdim=True)).squeeze(1)
        framed[positions] = chosen  # still -1 without an adjacent label
        waiting = chosen < 0
        positions, image, color = positions[waiting], image[waiting], color[waiting]
    return framed.view(batch, labels.shape[1] + 2, -1)[:, 1:-1, 1:-1].contiguous()


def _run_starts(labels: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return for each pixel the index of the first pixel in its run of equal labels."""
    first = index.new_ones(labels.narrow(dim, 0, 1).shape, dtype=torch.bool)
    starts = torch.cat([first, labels.diff(dim=dim) != 0], dim=dim)
    return torch.where(starts, index, 0).cummax(dim=dim).values


@contextmanager
def _in_any_order() -> Iterator[None]:
    """Allow operations that deterministic mode refuses on a GPU: the minimum of integers does not depend on order."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)
