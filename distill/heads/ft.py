"""Factor transfer (Kim, Park, Kwak, 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d
from distill.heads.parts.maps import MapHead, total

SLOPE = 0.1
"""Of the leaky ReLU behind each convolution."""


class FT(MapHead):
    """Compares factors: what a paraphraser puts the teacher's maps in, and a translator the student's.

    The paraphraser is the encoder of an autoencoder of the teacher's maps, the translator a like stack of convolutions,
    both of `share` of the teacher's channels. The loss on the factors is the mean absolute difference of their
    attention maps, summed over the layers. The larger grid is pooled to the smaller.

    The autoencoder learns in the same run, by the mean squared error of its reconstruction; no other gradient reaches
    it. With an `initialization` of n epochs the head's loss is that error alone for n epochs, and from then on the loss
    on the factors of an encoder that is frozen: a copy, taken before the last step of the initialization, so that
    neither weight decay nor momentum moves it. What does not count takes part with weight 0, as DDP asks.

    The CRD benchmark gave it the last stage, the weight 200 and an initialization of 30 epochs of weight 1. Here that
    is `initialization: 30` and `Step(milestones=[30], factor=200)` as the term's weight; give the task
    `Start(epochs=30)`, or the student learns from the labels meanwhile.

    Args:
        of: the layers: `tokens` or names of taps.
        share: k, the factors' channels as a share of the teacher's; 0.5 as in the CRD benchmark.
        initialization: epochs (fractions included) for the autoencoder alone; without a number it learns beside the
            student in every step, and 0 leaves the paraphraser as it was made, at random.

    Raises:
        UserError: an argument out of its range.
    """

    exact_gradient: ClassVar[Mapping[str, Any]] = {"initialization": 0.0}

    def __init__(
        self, of: Sequence[str] | str = ("tokens",), share: float = 0.5, initialization: float | None = None
    ) -> None:
        super().__init__(of)
        if not share > 0:
            raise UserError(f"share must be above 0, given {share}")
        if initialization is not None and initialization < 0:
            raise UserError(f"initialization must be at least 0 epochs, given {initialization}")
        self.share, self.initialization = share, initialization
        self._seen: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make translator, paraphraser and, where it learns, the autoencoder for each layer.

        Raises:
            UserError: a layer has a single cell.
        """
        super().build(student, teacher)
        self.require_cells()
        self.translators, encoders, decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for own, other in self.layers:
            width = max(1, int(other.width * self.share))
            self.translators.append(_stack(own.width, own.width, width, width))
            encoders.append(_stack(other.width, other.width, width, width))
            decoders.append(_stack(width, width, other.width, other.width))
        self.paraphrasers = deepcopy(encoders).requires_grad_(False)
        if self.initialization != 0:
            self.encoders, self.decoders = encoders, decoders

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the factors of the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        maps = self.maps(student, teacher)
        self._seen = {}
        if self.initialization == 0:
            return self._compare(maps)
        if self.initialization is not None and self.progress.epoch >= self.initialization:
            return self._compare(maps) + 0 * self._sum_of_autoencoders()
        self._keep_encoders()
        compared, reconstructed = self._compare(maps), self._reconstruct([other for _, other in maps])
        return reconstructed + (compared if self.initialization is None else 0 * compared)

    def diagnostics(self) -> dict[str, Tensor]:
        """The loss on the factors, and while the autoencoder learns the error of its reconstruction."""
        return self._seen

    def _compare(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        for translate, paraphrase, (own, other) in zip(self.translators, self.paraphrasers, maps, strict=True):
            losses.append(functional.factor_transfer(translate(own), paraphrase(other)))
        loss = total(losses)
        self._seen["factors"] = loss.detach()
        return loss

    def _reconstruct(self, maps: list[Tensor]) -> Tensor:
        coders = zip(self.encoders, self.decoders, maps, strict=True)
        loss = total([F.mse_loss(decode(encode(given)), given) for encode, decode, given in coders])
        self._seen["reconstruction"] = loss.detach()
        return loss

    def _sum_of_autoencoders(self) -> Tensor:
        """A scalar that every parameter of theirs takes part in."""
        parameters = [*self.encoders.parameters(), *self.decoders.parameters()]
        return total([parameter.sum() for parameter in parameters])

    @torch.no_grad()
    def _keep_encoders(self) -> None:
        """Make the paraphrasers what the encoders are now."""
        for kept, learned in zip(self.paraphrasers.parameters(), self.encoders.parameters(), strict=True):
            kept.copy_(learned)


def _stack(*widths: int) -> nn.Sequential:
    """3 x 3 convolutions from each width to the next; at stride 1 a transposed one is one too."""
    layers: list[nn.Module] = []
    for channels, width in pairwise(widths):
        layers += [CastConv2d(channels, width, side=3), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)
