"""Factor transfer (Kim, Park, Kwak, 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import require_above, require_at_least
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d, conv_norm
from distill.heads.parts.maps import MapHead, total

SLOPE = 0.1
"""Negative slope of the leaky ReLU after each convolution."""


class FT(MapHead):
    """Difference between factors of both networks' maps, extracted by a paraphraser and a translator.

    The paraphraser is the encoder of an autoencoder of the teacher's maps, the translator a stack of convolutions of
    the same kind, with batch normalization over all ranks; both have `share` of the teacher's channels. The loss on the
    factors is the mean absolute difference of their attention maps, summed over the layers. The larger grid is pooled
    to the smaller.

    The autoencoder is trained in the same run by the mean squared error of its reconstruction; no other gradient
    reaches it. With an `initialization` of n epochs, the head's loss is that error alone for n epochs, and then the
    loss on the factors of a frozen encoder: a copy taken before the last step of the initialization, which neither
    weight decay nor momentum changes. Inactive parts take part with weight 0, as DDP requires.

    The CRD benchmark uses the last stage, weight 200 and an initialization of 30 epochs of weight 1. Here that is
    `initialization: 30` and `Step(milestones=[30], factor=200)` as the term's weight; give the task `After(epochs=30)`,
    or the student learns from the labels meanwhile. The benchmark trains the paraphraser with an optimizer of its own:
    at a learning rate of 0.01 for ResNet and WRN students (the student's own for others), and the student afterwards
    without the momentum gathered before. Here one optimizer and one learning rate serve both stages, and weight decay
    acts on the student in both.

    Args:
        of: the layers: `tokens` or names of taps.
        share: k, the factors' channels as a share of the teacher's; 0.5 as in the CRD benchmark.
        initialization: epochs (fractions included) for the autoencoder alone; `null` trains it beside the student in
            every step, and 0 leaves the paraphraser at its random initialization.
        batch_norm: whether the translator normalizes before each leaky ReLU, with the statistics of the batch; as in
            the CRD benchmark, where the paraphraser has none either. A convolution before it has no bias, which would
            cancel.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(
        self,
        of: Sequence[str] | str = ("tokens",),
        share: float = 0.5,
        initialization: float | None = None,
        batch_norm: bool = True,
    ) -> None:
        super().__init__(of)
        require_above(0, share=share)
        require_at_least(0, initialization=initialization)
        self.share, self.initialization, self.batch_norm = share, initialization, batch_norm
        self._diagnostics: dict[str, Tensor] = {}

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build translator, paraphraser and, if it is trained, the autoencoder for each layer.

        Raises:
            UserError: the common grid of a layer has a single cell.
        """
        super().build(student, teacher)
        self.require_cells()
        self.translators, encoders, decoders = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer, target in self.layers:
            width = max(1, int(target.width * self.share))
            translate = conv_norm if self.batch_norm else CastConv2d
            self.translators.append(_stack(translate, layer.width, layer.width, width, width))
            encoders.append(_stack(CastConv2d, target.width, target.width, width, width))
            decoders.append(_stack(_transposed, width, width, target.width, target.width))
        self.paraphrasers = deepcopy(encoders).requires_grad_(False)
        if self.initialization != 0:
            self.encoders, self.decoders = encoders, decoders

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the factors of the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        maps = self.maps(student, teacher)
        self._diagnostics = {}
        if self.initialization == 0:
            return self._compare(maps)
        if self.initialization is not None and self.progress.epoch >= self.initialization:
            return self._compare(maps) + 0 * self._sum_of_autoencoders()
        if self.training:
            self._keep_encoders()
        compared, reconstructed = self._compare(maps), self._reconstruct([teacher_map for _, teacher_map in maps])
        return reconstructed + (compared if self.initialization is None else 0 * compared)

    @property
    def is_pure(self) -> bool:
        """Never: it keeps a copy of its encoders."""
        return False

    @property
    def is_scheduled(self) -> bool:
        """Whether there are epochs of initialization, whose loss is another."""
        return bool(self.initialization) or super().is_scheduled

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the loss on the factors and, while the autoencoder is trained, its reconstruction error."""
        return self._diagnostics

    def _compare(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = []
        coders = zip(self.translators, self.paraphrasers, maps, strict=True)
        for translate, paraphrase, (student_map, teacher_map) in coders:
            losses.append(functional.factor_transfer(translate(student_map), paraphrase(teacher_map)))
        loss = total(losses)
        self._diagnostics["factors"] = loss.detach()
        return loss

    def _reconstruct(self, maps: list[Tensor]) -> Tensor:
        coders = zip(self.encoders, self.decoders, maps, strict=True)
        loss = total([F.mse_loss(decode(encode(original)), original) for encode, decode, original in coders])
        self._diagnostics["reconstruction"] = loss.detach()
        return loss

    def _sum_of_autoencoders(self) -> Tensor:
        """Return a scalar that depends on every parameter of the autoencoders."""
        parameters = [*self.encoders.parameters(), *self.decoders.parameters()]
        return total([parameter.sum() for parameter in parameters])

    @torch.no_grad()
    def _keep_encoders(self) -> None:
        """Copy the encoders to the paraphrasers."""
        for copy, parameter in zip(self.paraphrasers.parameters(), self.encoders.parameters(), strict=True):
            copy.copy_(parameter)


def _stack(convolution: Callable[[int, int, int], nn.Module], *widths: int) -> nn.Sequential:
    """Return 3 x 3 convolutions from each width to the next, each followed by a leaky ReLU."""
    layers: list[nn.Module] = []
    for channels, width in pairwise(widths):
        layers += [convolution(channels, width, 3), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


def _transposed(channels: int, width: int, side: int) -> CastConv2d:
    """Return a convolution that begins as torch's transposed one, to which it is equivalent at stride 1."""
    convolution = CastConv2d(channels, width, side)
    bound = (width * side**2) ** -0.5  # torch takes a transposed convolution's outputs for its fan-in
    for parameter in convolution.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    return convolution
