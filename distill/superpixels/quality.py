"""Measures of the quality of segments without ground truth, one number per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.superpixels.color import rgb_to_lab
from distill.superpixels.connectivity import component_sizes, connected_components


def explained_variation(images: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of an image's variance in CIELAB that the mean colors of its segments explain.

    Args:
        images: `[B, 3, H, W]` or `[B, 1, H, W]` in [0, 1].
        labels: `[B, H, W]`, from 0.

    Returns:
        `[B]` float64 from 0 to 1; 1 for an image of one color.
    """
    colors = rgb_to_lab(images.double()).flatten(2).mT
    colors = colors - colors.mean(dim=1, keepdim=True)
    sums, sizes = _over_segments(colors, labels), _sizes(labels)
    explained = (sums.square().sum(dim=2) / sizes.clamp_min(1)).sum(dim=1)
    total = colors.square().sum(dim=(1, 2))
    return torch.where(total > 0, explained / total.masked_fill(total == 0, 1.0), 1.0)


def compactness(labels: Tensor) -> Tensor:
    """Return Schick's compactness: 4 pi area / perimeter^2 (1 for a circle), averaged over segments by area.

    Perimeters count pixel edges, including those at the image border, so that a square has pi / 4.

    Args:
        labels: `[B, H, W]`, from 0.

    Returns:
        `[B]` float64.
    """
    edges = torch.zeros_like(labels, dtype=torch.float64)
    for dim in (1, 2):
        inner = (labels.diff(dim=dim) != 0).double()
        border = torch.ones_like(edges.narrow(dim, 0, 1))
        edges += torch.cat([border, inner], dim=dim) + torch.cat([inner, border], dim=dim)
    perimeters = _over_segments(edges.flatten(1).unsqueeze(2), labels).squeeze(2)
    sizes = _sizes(labels)
    return (4 * math.pi * sizes.square() / perimeters.square().clamp_min(1)).sum(dim=1) / sizes.sum(dim=1)


def connectivity(labels: Tensor) -> Tensor:
    """Return the fraction of pixels that are in the largest connected component of their segment.

    Args:
        labels: `[B, H, W]`, from 0.

    Returns:
        `[B]` float64; exactly 1 if every segment is connected.
    """
    components, owners = connected_components(labels).flatten(1), labels.flatten(1)
    sizes = component_sizes(components)
    largest = sizes.new_zeros(len(labels), int(labels.max()) + 1).scatter_reduce(1, owners, sizes, "amax")
    return largest.sum(dim=1).double() / owners.shape[1]


def _sizes(labels: Tensor) -> Tensor:
    ones = torch.ones_like(labels, dtype=torch.float64)
    return _over_segments(ones.flatten(1).unsqueeze(2), labels).squeeze(2)


def _over_segments(values: Tensor, labels: Tensor) -> Tensor:
    """Sum `[B, H * W, f]` over each segment, `[B, K, f]`."""
    owners = labels.flatten(1).unsqueeze(2).expand_as(values)
    return values.new_zeros(len(values), int(labels.max()) + 1, values.shape[2]).scatter_add(1, owners, values)
