"""Graphs of tokens, drawn over their images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.functional.graphs import edge_similarities, nearest_neighbors, neighbor_distances

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from distill.superpixels.association import Grid

SHARED, SINGLE = "tab:orange", "tab:blue"


def draw_graphs(
    images: Tensor, student: Tensor, teacher: Tensor, grid: Grid, neighbors: int, sigma: float | None = None
) -> Figure:
    """Draw one row per image: the image, the teacher's graph of its tokens, and the student's.

    Edges lead from each token to its k nearest tokens of the same image; the more similar, the stronger the edge.

    Args:
        images: `[B, C, H, W]` in [0, 1].
        student: `[B, N, d_s]`, row by row.
        teacher: `[B, N, d_t]`.
        grid: `(h, w)` of the tokens of both, `h * w = N`.
        neighbors: k, limited to the number of other tokens.
        sigma: the scale of squared distances; by default their mean over the edges of each graph.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    neighbors = min(neighbors, student.shape[1] - 1)
    figure = Figure(figsize=(9, 3.1 * len(images) + 0.5), layout="constrained")
    rows = figure.subplots(len(images), 3, squeeze=False)
    for axes, image, *graphs in zip(rows, images, teacher, student, strict=True):
        edges = [nearest_neighbors(nodes, neighbors) for nodes in graphs]
        _show_image(axes[0], image, opacity=1.0)
        for plot, nodes, (targets, compared) in zip(axes[1:], graphs, (edges, edges[::-1]), strict=True):
            shared = (targets.unsqueeze(2) == compared.unsqueeze(1)).any(dim=2)
            similarity = edge_similarities(neighbor_distances(nodes, targets), sigma)
            _show_image(plot, image, opacity=0.45)
            _draw_edges(plot, targets, similarity, shared, grid, image.shape)
        axes[2].set_xlabel(f"{100 * shared.sum().item() / max(shared.numel(), 1):.0f} % of the edges are shared")
    for axis, title in zip(rows[0], ("image", "teacher", "student"), strict=True):
        axis.set_title(title)
    legend = [
        Line2D([], [], color=SHARED, label="in both graphs"),
        Line2D([], [], color=SINGLE, label="in this graph only"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _show_image(axes: Axes, image: Tensor, opacity: float) -> None:
    """Show the image, pale and without colors if something is drawn over it."""
    picture = image.detach().float().cpu().clamp(0, 1)
    if opacity < 1 or len(picture) not in (1, 3):
        picture = picture.mean(dim=0, keepdim=True)
    pixels = picture.movedim(0, -1) if len(picture) == 3 else picture[0]
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, alpha=opacity)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_edges(axes: Axes, targets: Tensor, similarity: Tensor, shared: Tensor, grid: Grid, shape: torch.Size) -> None:
    """Draw edges from each token to its `targets` `[N, k]`, as strong as their `similarity` `[N, k]`."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    token = torch.arange(grid[0] * grid[1])
    x = (token % grid[1] + 0.5) * shape[-1] / grid[1] - 0.5
    y = (token // grid[1] + 0.5) * shape[-2] / grid[0] - 0.5
    centers = torch.stack([x, y], dim=1)
    targets, similarity, shared = (tensor.detach().cpu() for tensor in (targets, similarity, shared))
    lines = torch.stack([centers.unsqueeze(1).expand(-1, targets.shape[1], -1), centers[targets]], dim=2)
    thickness = 2.0 * min(1.0, (200 / max(targets.numel(), 1)) ** 0.5)  # many edges would hide the image and each other
    for color, mask in ((SINGLE, ~shared), (SHARED, shared)):
        strength = similarity[mask].float()
        opaque = torch.tensor([*to_rgb(color), 0.8]).repeat(len(strength), 1)
        opaque[:, 3] *= strength
        axes.add_collection(
            LineCollection(
                list(lines[mask].numpy()), colors=opaque.numpy(), linewidths=(thickness * (0.1 + strength)).numpy()
            )
        )
    axes.scatter(x, y, s=5, color="black", zorder=3)
