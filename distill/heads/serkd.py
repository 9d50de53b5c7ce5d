"""Semantics-based relation knowledge distillation (Yan, Liu, Ye, 2025): relations among superpixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec
from distill.functional import angle_cosines, huber, normalized_distances
from distill.heads.base import Batch, RelationHead
from distill.heads.parts.grid_tokens import TOKENIZERS, GridTokens, Tokenizer, averaged
from distill.heads.parts.projection import CastLinear
from distill.plotting.images import Kind, enlarged, grid_of_pictures, mean_colors, with_borders
from distill.superpixels import segment_tokens, slic, soft_association, soft_superpixels, superpixel_grid
from distill.superpixels.association import Gradient, Grid, Neighborhood

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELATIONS = {"distance": normalized_distances, "angle": angle_cosines}


class SeRKD(RelationHead):
    """Distances between pairs and angles in triples of an image's superpixels, each compared by the Huber loss.

    Each network's tokens are put together to superpixels, and what is compared is how these are related within each
    image. Soft superpixels are found in each network's own tokens, on one grid for both; segments are found in the
    pixels (by the callback that puts them into the batch) and are the same for both.

    Distances are divided by their mean over the image's non-zero pairs. The means run over all L^2 pairs and L^3
    triples of an image, degenerate ones included as zeros; with segments, over those whose segments are all present.
    Memory grows with L^3 as long as `angle` is not 0.

    The paper's text was not at hand: where the summaries of it are silent, the defaults are this project's.

    Args:
        superpixels: `soft` ones of the tokens, or pixel `segments`.
        distance: weight of the distances.
        angle: weight of the angles.
        features: weight of a mean squared error between the teacher's tokens and the student's, which are mapped to the
            teacher's width first; where the grids differ, both are averaged over the cells of the coarser one.
        cell: tokens to a soft superpixel, in the network whose grid is the coarser one.
        iterations: how often the tokens are shared out among the soft superpixels.
        neighborhood: `cells` shares a token among the 3 x 3 cells around it, `all` among all.
        gradient: it passes through the `values` that are averaged to superpixels, or through their weights too, `full`.
        count: how many segments there may be: labels are `0 .. count - 1`.
        of: the features that are related: `tokens`, or a tap whose output is a token grid or a map.
        tokenizer: how the map of a tap becomes tokens: `average` or `max` pooling, or a strided `convolution` that is
            trained, where the teacher's map is averaged.
        stride: by how much that makes the map coarser.

    Raises:
        UserError: an argument out of its range.
    """

    scopes = ("image",)
    exact_gradient: ClassVar[Mapping[str, Any]] = {"gradient": "full"}

    def __init__(
        self,
        superpixels: Literal["soft", "segments"] = "soft",
        distance: float = 1.0,
        angle: float = 2.0,
        features: float = 0.0,
        cell: Grid = (2, 2),
        iterations: int = 1,
        neighborhood: Neighborhood = "cells",
        gradient: Gradient = "values",
        count: int = 49,
        of: str = "tokens",
        tokenizer: Tokenizer = "average",
        stride: int = 2,
    ) -> None:
        super().__init__("image")
        if distance == angle == 0:
            raise UserError("SeRKD compares nothing with distance 0 and angle 0: give at least one of them a weight")
        for name, given, least in (("iterations", iterations, 0), ("count", count, 1), ("stride", stride, 1)):
            if given < least:
                raise UserError(f"{name} must be at least {least}, given {given}")
        one_of("neighborhood", neighborhood, ("cells", "all"))
        one_of("gradient", gradient, ("values", "full"))
        one_of("tokenizer", tokenizer, TOKENIZERS)
        self.needs = frozenset({of})
        self.superpixel_kind = one_of("superpixels", superpixels, ("soft", "segments"))
        if superpixels == "segments":
            self.batch_needs = frozenset({"segments"})
        self.weights = {"distance": distance, "angle": angle, "features": features}
        self.cell, self.iterations, self.count = cell, iterations, count
        self.neighborhood: Neighborhood = neighborhood
        self.gradient: Gradient = gradient
        self.of, self.stride = of, stride
        self.tokenizer: Tokenizer = tokenizer
        self._seen: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make what reads the tokens, and the projection if `features` has a weight.

        Raises:
            UserError: a network gives no token grid, or the grid is too small for superpixels that could be related.
        """
        self.student_grid = GridTokens(self.of, student, "student", self.tokenizer, self.stride)
        # A convolution of the teacher's could only be trained towards agreeing with the student.
        pooled: Tokenizer = "average" if self.tokenizer == "convolution" else self.tokenizer
        self.teacher_grid = GridTokens(self.of, teacher, "teacher", pooled, self.stride)
        grids = self.student_grid.grid, self.teacher_grid.grid
        self.common = min(grids[0][0], grids[1][0]), min(grids[0][1], grids[1][1])
        self.target = superpixel_grid(self.common, self.cell)
        if self.superpixel_kind == "soft" and self.target[0] * self.target[1] < 3:
            raise UserError(
                f"cells of {self.cell[0]} x {self.cell[1]} tokens make {self.target[0]} x {self.target[1]} superpixels "
                f"of {self.common[0]} x {self.common[1]} tokens: relations need at least 3, so give a smaller cell or "
                "features on a finer grid"
            )
        if self.weights["features"] != 0:
            self.projection = CastLinear(self.student_grid.width, self.teacher_grid.width)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the relations among the superpixels, and the tokens themselves if `features` has a weight."""
        student, teacher = self.student_grid(student), self.teacher_grid(teacher)
        (own, present), (other, _) = self.superpixels(student, batch), self.superpixels(teacher, batch)
        loss = self.compare(self.relate(own, present), self.relate(other, present), present)
        if self.weights["features"] == 0:
            return loss
        difference = F.mse_loss(self.projection(averaged(student, self.common)), averaged(teacher, self.common))
        self._seen["features"] = difference.detach()
        return loss + self.weights["features"] * difference

    def superpixels(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Put the tokens that `student_grid` or `teacher_grid` read together to superpixels.

        Returns:
            `[B, L, d]` and, with segments, which of them are present, `[B, L]`.

        Raises:
            UserError: segments are needed, and the batch has none or none of the images' size.
        """
        tokens, grid = _tokens_on_grid(features)
        if self.superpixel_kind == "segments":
            return segment_tokens(tokens, grid, _segments(batch), self.count)
        soft = soft_superpixels(
            tokens,
            grid,
            target=self.target,
            iterations=self.iterations,
            neighborhood=self.neighborhood,
            gradient=self.gradient,
        )
        return soft, None

    def tokens(self, features: Features, batch: Batch) -> Tensor:
        """What is related: the superpixels, `[B, L, d]`."""
        return self.superpixels(features, batch)[0]

    def relate(self, tokens: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        """Distances `[B, L, L]` and cosines `[B, L, L, L]`, those whose weight is not 0."""
        return {name: relate(tokens, present) for name, relate in RELATIONS.items() if self.weights[name] != 0}

    def compare(
        self, student_relation: dict[str, Tensor], teacher_relation: dict[str, Tensor], present: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the Huber losses, each a mean over the images of the mean within the image."""
        losses = {
            name: _mean_huber(relation, teacher_relation[name], present) for name, relation in student_relation.items()
        }
        self._seen = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()

    def diagnostics(self) -> dict[str, Tensor]:
        """The parts of the loss, before their weights."""
        return self._seen

    def plot(self, student: Features, teacher: Features, batch: Batch, images: int = 4) -> Figure:
        """Draw images, their segments, each network's soft superpixels, and the distances among what is related.

        The segments are those of the batch; if it has none, as many as there are superpixels are found here.

        Args:
            student: what the student saw.
            teacher: what the teacher saw.
            batch: what both looked at.
            images: how many images, one row each.
        """
        image = batch["image"][:images].float().cpu()
        count = self.count if self.superpixel_kind == "segments" else self.target[0] * self.target[1]
        segments = batch["segments"][:images].cpu() if "segments" in batch else slic(image, count)
        rows: list[dict[str, tuple[Kind, Tensor]]] = [
            {"image": ("image", enlarged(one)), "segments": ("image", with_borders(one, labels))}
            for one, labels in zip(image, segments, strict=True)
        ]
        distances: dict[str, Tensor] = {}
        for side, features in (("teacher", self.teacher_grid(teacher)), ("student", self.student_grid(student))):
            tokens, grid = _tokens_on_grid(features)
            shares = soft_association(
                tokens[:images], grid, target=self.target, iterations=self.iterations, neighborhood=self.neighborhood
            ).cpu()
            distances[side] = normalized_distances(*self.superpixels(features, batch))[:images].cpu()
            for row, one, share in zip(rows, image, shares, strict=True):
                painted = mean_colors(one, share, grid)
                row[f"{side}'s superpixels"] = "image", with_borders(painted, share.argmax(1).view(grid))
        for place, row in enumerate(rows):
            for side, relation in distances.items():
                row[f"{side}'s distances"] = "relation", relation[place]
            row["student's - teacher's"] = "difference", distances["student"][place] - distances["teacher"][place]
        return grid_of_pictures(rows)


def _mean_huber(student: Tensor, teacher: Tensor, present: Tensor | None) -> Tensor:
    """Mean over the images of the mean within each, over entries all of whose superpixels are present."""
    if present is None:
        return huber(student, teacher)
    entries = present.sum(dim=1) ** (student.ndim - 1)
    each = F.huber_loss(student, teacher, reduction="none").flatten(1).sum(dim=1)  # the others are 0 in both
    return (each / entries.clamp_min(1)).mean()


def _tokens_on_grid(features: Features) -> tuple[Tensor, Grid]:
    assert features.grid is not None
    return features["tokens"], features.grid


def _segments(batch: Batch) -> Tensor:
    if "segments" not in batch:
        raise UserError("SeRKD with superpixels 'segments' needs 'segments' in the batch, and it has none")
    segments: Tensor = batch["segments"]
    if segments.shape[1:] != batch["image"].shape[2:]:
        raise UserError(
            f"segments must be as large as the images, {tuple(batch['image'].shape[2:])}, given {tuple(segments.shape)}"
        )
    return segments
