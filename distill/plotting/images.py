"""Pictures of images with the borders of their segments, and of relations as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["image", "relation", "difference"]

MIN_SIDE = 256
"""Minimum length in pixels of a drawn image's shorter side, so that borders are thin."""
YELLOW = (1.0, 0.85, 0.1)


def with_borders(image: Tensor, labels: Tensor) -> Tensor:
    """Return an image with the borders between its segments in yellow.

    Args:
        image: `[C, H, W]` in [0, 1].
        labels: `[h, w]`, of pixels or of tokens.

    Returns:
        `[3, H', W']`, enlarged if the image is small.
    """
    size = _drawn_size(image)
    fine = labels[_cell_of_pixel(labels.shape[0], size[0])][:, _cell_of_pixel(labels.shape[1], size[1])]
    border = torch.zeros(size, dtype=torch.bool)
    border[:, 1:] |= fine[:, 1:] != fine[:, :-1]
    border[1:] |= fine[1:] != fine[:-1]
    return torch.where(border, torch.tensor(YELLOW).view(3, 1, 1), enlarged(image))


def enlarged(image: Tensor) -> Tensor:
    """Return an image `[C, H, W]` as colors `[3, H', W']` in [0, 1], of the size that `with_borders` returns."""
    height, width = _drawn_size(image)
    colors = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return colors[:, _cell_of_pixel(image.shape[1], height)][..., _cell_of_pixel(image.shape[2], width)].clamp(0, 1)


def grid_of_pictures(rows: Sequence[Mapping[str, tuple[Kind, Tensor]]], side: float = 1.9) -> Figure:
    """Draw rows of images and matrices, with one color scale per row.

    Args:
        rows: title -> picture for each row, all with the same titles: `("image", [3, H, W])`; `("relation", [L, L])`,
            which share a scale from 0; or `("difference", [L, L])`, with a scale around 0.
        side: of each picture, in inches.
    """
    from matplotlib.figure import Figure

    titles = list(rows[0])
    last_relation = next((title for title in reversed(titles) if rows[0][title][0] == "relation"), None)
    figure = Figure(figsize=(side * len(titles), 0.2 + side * len(rows)), layout="constrained")
    for axes_row, row in zip(figure.subplots(len(rows), len(titles), squeeze=False), rows, strict=True):
        largest = max((float(tensor.max()) for kind, tensor in row.values() if kind == "relation"), default=1.0)
        for axes, (title, (kind, tensor)) in zip(axes_row, row.items(), strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if row is rows[0]:
                axes.set_title(title, fontsize=9)
            if kind == "image":
                axes.imshow(tensor.permute(1, 2, 0).numpy())
                continue
            if kind == "relation":
                drawn = axes.imshow(tensor.numpy(), cmap="viridis", vmin=0.0, vmax=largest)
            else:
                limit = max(float(tensor.abs().max()), 1e-6)
                drawn = axes.imshow(tensor.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            if title == last_relation or kind == "difference":
                bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
                bar.ax.tick_params(labelsize=6)
    return figure


def mean_colors(image: Tensor, association: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return an image in which every token has the mean color of the superpixels that it belongs to.

    Args:
        image: `[C, H, W]` in [0, 1].
        association: `[N, L]`, rows sum to 1.
        grid: `(h, w)` of the tokens.

    Returns:
        `[C, h, w]`.
    """
    colors = F.adaptive_avg_pool2d(image, grid).flatten(1)  # [C, N]
    of_superpixels = colors @ (association / association.sum(dim=0).clamp_min(1e-12))
    return (of_superpixels @ association.T).view(len(image), *grid)


def _drawn_size(image: Tensor) -> tuple[int, int]:
    factor = -(-MIN_SIDE // min(image.shape[1:]))
    return image.shape[1] * factor, image.shape[2] * factor


def _cell_of_pixel(cells: int, pixels: int) -> Tensor:
    """Return the cell that contains the center of each pixel."""
    return (2 * torch.arange(pixels) + 1) * cells // (2 * pixels)
