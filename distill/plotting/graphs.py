"""Graphs of tokens, drawn over the images that the tokens are of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.functional.graphs import edge_similarities, nearest_neighbors, neighbor_distances

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from distill.superpixels.association import Grid

SHARED, OWN = "tab:orange", "tab:blue"


def draw_graphs(
    images: Tensor, student: Tensor, teacher: Tensor, grid: Grid, neighbors: int, sigma: float | None = None
) -> Figure:
    """One row an image: the image, the teacher's graph of its tokens, and the student's.

    An edge leads from each token to its k nearest of the same image; the more similar the two, the stronger it is.

    Args:
        images: `[B, C, H, W]` in [0, 1].
        student: `[B, N, d_s]`, row by row.
        teacher: `[B, N, d_t]`.
        grid: `(h, w)` of the tokens of both, `h * w = N`.
        neighbors: k; at most all others are drawn.
        sigma: the scale of squared distances; their mean over the edges of each graph if not given.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    neighbors = min(neighbors, student.shape[1] - 1)
    figure = Figure(figsize=(9, 3.1 * len(images) + 0.5), layout="constrained")
    rows = figure.subplots(len(images), 3, squeeze=False)
    for axes, image, own, other in zip(rows, images, student, teacher, strict=True):
        edges = [nearest_neighbors(nodes, neighbors) for nodes in (other, own)]
        _show(axes[0], image, opacity=1.0)
        for place, nodes, (mine, theirs) in zip(axes[1:], (other, own), (edges, edges[::-1]), strict=True):
            _show(place, image, opacity=0.45)
            shared = (mine.unsqueeze(2) == theirs.unsqueeze(1)).any(dim=2)
            _draw(place, mine, edge_similarities(neighbor_distances(nodes, mine), sigma), shared, grid, image.shape)
        axes[2].set_xlabel(f"{100 * shared.sum().item() / max(shared.numel(), 1):.0f} % of the edges are shared")
    for axis, title in zip(rows[0], ("image", "teacher", "student"), strict=True):
        axis.set_title(title)
    legend = [
        Line2D([], [], color=SHARED, label="in both graphs"),
        Line2D([], [], color=OWN, label="in this one alone"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _show(axes: Axes, image: Tensor, opacity: float) -> None:
    """The image, paler and without its colors if something is drawn over it."""
    picture = image.detach().float().cpu().clamp(0, 1)
    if opacity < 1 or len(picture) not in (1, 3):
        picture = picture.mean(dim=0, keepdim=True)
    shown = picture.movedim(0, -1) if len(picture) == 3 else picture[0]
    axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, alpha=opacity)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw(axes: Axes, places: Tensor, similarity: Tensor, shared: Tensor, grid: Grid, shape: torch.Size) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    token = torch.arange(grid[0] * grid[1])
    x = (token % grid[1] + 0.5) * shape[-1] / grid[1] - 0.5
    y = (token // grid[1] + 0.5) * shape[-2] / grid[0] - 0.5
    centers = torch.stack([x, y], dim=1)
    places, similarity, shared = (tensor.detach().cpu() for tensor in (places, similarity, shared))
    lines = torch.stack([centers.unsqueeze(1).expand(-1, places.shape[1], -1), centers[places]], dim=2)
    thickness = 2.0 * min(1.0, (200 / max(places.numel(), 1)) ** 0.5)  # many edges would hide the image and each other
    for color, kept in ((OWN, ~shared), (SHARED, shared)):
        strength = similarity[kept].float()
        opaque = torch.tensor([*to_rgb(color), 0.8]).repeat(len(strength), 1)
        opaque[:, 3] *= strength
        axes.add_collection(
            LineCollection(
                list(lines[kept].numpy()), colors=opaque.numpy(), linewidths=(thickness * (0.1 + strength)).numpy()
            )
        )
    axes.scatter(x, y, s=5, color="black", zorder=3)
