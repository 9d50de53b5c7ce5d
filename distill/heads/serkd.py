"""Semantics-based relation knowledge distillation (Yan, Liu, Ye, 2025): relations among superpixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError, one_of, require_at_least
from distill.features import Features, FeatureSpec, Summary
from distill.functional import (
    angle_difference,
    centered_gram,
    divided_by_mean,
    edges_of,
    huber,
    normalized_distances,
    pack_symmetric,
    row_distances,
    unpack_symmetric,
)
from distill.heads.base import Batch, Head
from distill.heads.parts.grid_tokens import TOKENIZERS, GridTokens, Tokenizer, averaged
from distill.heads.parts.projection import CastLinear
from distill.superpixels import segment_tokens, slic, soft_association, soft_superpixels, superpixel_grid
from distill.superpixels.association import Gradient, Grid, Neighborhood

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SeRKD(Head):
    """Distances between pairs and angles in triples of an image's superpixels, each compared by the Huber loss.

    Each network's tokens are pooled to superpixels, and the relations among the superpixels of each image are compared.
    Soft superpixels are computed from each network's own tokens, on one grid for both; segments are computed from the
    pixels (by the callback that adds them to the batch) and are the same for both.

    Distances are divided by their mean over the image's non-zero pairs. The means run over all L^2 pairs and L^3
    triples of an image, degenerate ones included as zeros; with segments, over those whose segments are all present.
    Memory grows with L^2 per image, and time with L^3 unless `angle` is 0.

    The paper's text was not available: where its summaries are silent, the defaults are this project's.

    Args:
        superpixels: `soft` superpixels of the tokens, or pixel `segments`.
        distance: weight of the distances.
        angle: weight of the angles.
        features: weight of a mean squared error between the teacher's tokens and the student's, projected to the
            teacher's width; if the grids differ, both are averaged over the cells of the coarser one.
        cell: tokens per soft superpixel (height, width), in the network with the coarser grid.
        iterations: iterations of the soft assignment of tokens to superpixels.
        neighborhood: `cells` assigns a token to the 3 x 3 cells around it, `all` to all of them.
        gradient: `values` lets gradient pass through the averaged tokens only, `full` through their weights too.
        count: upper limit of the number of segments: labels are `0 .. count - 1`.
        of: the features that are related: `tokens`, or a tap whose output is a token grid or a map.
        tokenizer: how a tapped map becomes tokens: `average` or `max` pooling, or a trained strided `convolution`, for
            which the teacher's map is averaged.
        stride: the factor by which the tokenizer makes a map coarser.

    Raises:
        UserError: an argument out of its range.
    """

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
        super().__init__()
        if distance == angle == 0:
            raise UserError("SeRKD compares nothing with distance 0 and angle 0: give at least one of them a weight")
        require_at_least(0, iterations=iterations)
        require_at_least(1, count=count, stride=stride)
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
        self._diagnostics: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of the tokens, and the projection if `features` has a weight.

        Raises:
            UserError: a network has no token grid, or the grid is too coarse for superpixels that can be related.
        """
        self.student_grid = GridTokens(self.of, student, "student", self.tokenizer, self.stride)
        # A convolution on the teacher's side could only be trained to agree with the student.
        self.teacher_tokenizer: Tokenizer = "average" if self.tokenizer == "convolution" else self.tokenizer
        self.teacher_grid = GridTokens(self.of, teacher, "teacher", self.teacher_tokenizer, self.stride)
        self.teacher_shape = teacher[self.of]
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

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the packed Gram matrix of the superpixels as `gram`, and the tokens if `features` has a weight."""
        teacher = self.teacher_grid(teacher)
        gram = pack_symmetric(centered_gram(self.superpixels(teacher, batch)[0]))
        if self.weights["features"] == 0:
            return Summary(maps={"gram": gram})
        return Summary(tokens=averaged(teacher, self.common), grid=self.common, maps={"gram": gram})

    def summary_key(self) -> Mapping[str, Any]:
        """Return the settings of the teacher's superpixels."""
        key: dict[str, Any] = {"of": self.of, "superpixels": self.superpixel_kind}
        if len(self.teacher_shape) == 3:
            key |= {"tokenizer": self.teacher_tokenizer, "stride": self.stride}
        if self.superpixel_kind == "segments":
            key |= {"count": self.count}
        else:
            key |= {"grid": self.target, "iterations": self.iterations, "neighborhood": self.neighborhood}
        return key if self.weights["features"] == 0 else {**key, "tokens": self.common}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the relations among the superpixels, and the tokens themselves if `features` has a weight."""
        student = self.student_grid(student)
        superpixels, present = self.superpixels(student, batch)
        gram, target_gram = centered_gram(superpixels), unpack_symmetric(teacher["gram"])
        distances, target_distances = row_distances(gram, present), row_distances(target_gram, present)
        losses: dict[str, Tensor] = {}
        if self.weights["distance"] != 0:
            losses["distance"] = _mean_huber(divided_by_mean(distances), divided_by_mean(target_distances), present)
        if self.weights["angle"] != 0:
            losses["angle"] = angle_difference(
                edges_of(gram, distances), edges_of(target_gram, target_distances), present
            )
        self._diagnostics = {name: loss.detach() for name, loss in losses.items()}
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        if self.weights["features"] == 0:
            return total
        difference = F.mse_loss(self.projection(averaged(student, self.common)), teacher["tokens"])
        self._diagnostics["features"] = difference.detach()
        return total + self.weights["features"] * difference

    def superpixels(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Pool the tokens that `student_grid` or `teacher_grid` returned to superpixels.

        Returns:
            `[B, L, d]` and, with segments, a mask of the present ones, `[B, L]`.

        Raises:
            UserError: segments are needed, and the batch has none or none of the images' size.
        """
        tokens, grid = _tokens_on_grid(features)
        if self.superpixel_kind == "segments":
            return segment_tokens(tokens, grid, _segments(batch), self.count)
        superpixels = soft_superpixels(
            tokens,
            grid,
            target=self.target,
            iterations=self.iterations,
            neighborhood=self.neighborhood,
            gradient=self.gradient,
        )
        return superpixels, None

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the parts of the loss, before their weights."""
        return self._diagnostics

    @torch.no_grad()
    def plot(self, student: Features, teacher: Features, batch: Batch, images: int = 4) -> Figure:
        """Draw images, their segments, each network's soft superpixels, and the distances that are compared.

        The segments are those of the batch; if it has none, as many as there are superpixels are computed here.

        Args:
            student: the student's features.
            teacher: the teacher's features.
            batch: the batch of both.
            images: number of images, one row each.
        """
        from distill.plotting.superpixels import SuperpixelRelation, draw_superpixels

        def relation(features: Features) -> SuperpixelRelation:
            tokens, grid = _tokens_on_grid(features)
            association = soft_association(
                tokens[:images], grid, target=self.target, iterations=self.iterations, neighborhood=self.neighborhood
            )
            distances = normalized_distances(*self.superpixels(features, batch))[:images]
            return SuperpixelRelation(association, grid, distances)

        image = batch["image"][:images].float().cpu()
        count = self.count if self.superpixel_kind == "segments" else self.target[0] * self.target[1]
        segments = batch["segments"][:images] if "segments" in batch else slic(image, count)
        return draw_superpixels(
            image, segments, relation(self.student_grid(student)), relation(self.teacher_grid(teacher))
        )


def _mean_huber(student: Tensor, teacher: Tensor, present: Tensor | None) -> Tensor:
    """Return the mean over the images of each image's mean over the pairs of present superpixels."""
    if present is None:
        return huber(student, teacher)
    sums = F.huber_loss(student, teacher, reduction="none").sum(dim=(1, 2))  # absent entries are 0 in both
    return (sums / present.sum(dim=1).square().clamp_min(1)).mean()


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
