"""Pictures for people: images with the borders of their segments, and relations as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["image", "relation", "difference"]

FINE = 256
"""Pixels of a drawn image's shorter side, at least: so that borders are thin."""
YELLOW = (1.0, 0.85, 0.1)


def with_borders(image: Tensor, labels: Tensor) -> Tensor:
    """An image with the borders between its segments drawn in yellow.

    Args:
        image: `[C, H, W]` in [0, 1].
        labels: `[h, w]`, of pixels or of tokens.

    Returns:
        `[3, H', W']`, enlarged where the image is small.
    """
    size = _drawn_size(image)
    fine = labels[_places(labels.shape[0], size[0])][:, _places(labels.shape[1], size[1])]
    border = torch.zeros(size, dtype=torch.bool)
    border[:, 1:] |= fine[:, 1:] != fine[:, :-1]
    border[1:] |= fine[1:] != fine[:-1]
    return torch.where(border, torch.tensor(YELLOW).view(3, 1, 1), enlarged(image))


def enlarged(image: Tensor) -> Tensor:
    """An image `[C, H, W]` as colors `[3, H', W']` in [0, 1], as large as `with_borders` makes it."""
    height, width = _drawn_size(image)
    colors = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return colors[:, _places(image.shape[1], height)][..., _places(image.shape[2], width)].clamp(0, 1)


def grid_of_pictures(rows: Sequence[Mapping[str, tuple[Kind, Tensor]]], side: float = 1.9) -> Figure:
    """A figure of rows alike: images, and matrices with one scale in each row.

    Args:
        rows: for each row, by title, what there is to draw: `("image", [3, H, W])`, `("relation", [L, L])`, all of
            one scale, or `("difference", [L, L])`, around 0.
        side: of each part, in inches.
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
                most = max(float(tensor.abs().max()), 1e-6)
                drawn = axes.imshow(tensor.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
            if title == last_relation or kind == "difference":
                bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
                bar.ax.tick_params(labelsize=6)
    return figure


def mean_colors(image: Tensor, association: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image in which every token has the colors of the superpixels that it is shared out among.

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
    factor = -(-FINE // min(image.shape[1:]))
    return image.shape[1] * factor, image.shape[2] * factor


def _places(cells: int, pixels: int) -> Tensor:
    """The cell that each pixel's center lies in."""
    return (2 * torch.arange(pixels) + 1) * cells // (2 * pixels)
