"""Superpixels of two networks and the relations among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from distill.plotting.images import Kind, enlarged, grid_of_pictures, mean_colors, with_borders

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SuperpixelRelation(NamedTuple):
    """One network's superpixels and their distances.

    Attributes:
        association: shares of each token in the soft superpixels, `[B, N, L]`; rows sum to 1.
        grid: `(h, w)` of the tokens, `h * w = N`.
        distances: `[B, L', L']`.
    """

    association: Tensor
    grid: tuple[int, int]
    distances: Tensor


def draw_superpixels(
    images: Tensor, segments: Tensor, student: SuperpixelRelation, teacher: SuperpixelRelation
) -> Figure:
    """Draw one row per image: the image, its segments, both networks' superpixels and distances, their difference.

    Args:
        images: `[B, C, H, W]` in [0, 1].
        segments: integers `[B, H, W]`.
        student: of the same images.
        teacher: of the same images, with as many distances.
    """
    images, segments = images.detach().float().cpu(), segments.cpu()
    rows: list[dict[str, tuple[Kind, Tensor]]] = [
        {"image": ("image", enlarged(image)), "segments": ("image", with_borders(image, labels))}
        for image, labels in zip(images, segments, strict=True)
    ]
    relations = {"teacher": teacher, "student": student}
    for side, relation in relations.items():
        for row, image, association in zip(rows, images, relation.association.detach().float().cpu(), strict=True):
            painted = mean_colors(image, association, relation.grid)
            row[f"{side}'s superpixels"] = "image", with_borders(painted, association.argmax(1).view(relation.grid))
    distances = {side: relation.distances.detach().cpu() for side, relation in relations.items()}
    for index, row in enumerate(rows):
        for side, matrices in distances.items():
            row[f"{side}'s distances"] = "relation", matrices[index]
        row["student's - teacher's"] = "difference", distances["student"][index] - distances["teacher"][index]
    return grid_of_pictures(rows)
