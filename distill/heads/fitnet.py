"""FitNets' hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError, one_of
from distill.features import Features, FeatureSpec
from distill.functional import to_common_grid
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d, conv_norm
from distill.heads.parts.maps import MapHead, total


class FitNet(MapHead):
    """Mean squared difference of the teacher's maps and the student's, which a regressor brings to as many channels.

    This is feature matching in general: of a stage of both networks it is FitNets' hint, of `tokens` or `embedding`
    the common feature loss. The loss is the sum over the layers; the larger grid is pooled to the smaller first.

    The CRD benchmark gave it the second stage as its one layer and the weight 100. Its regressor ends in a ReLU,
    as the teacher's maps there do; ours does not, since tokens and embeddings are negative too. The paper trains the
    student up to the hint first: give the term the weight `Until`, and the task and the other terms `After`.

    Args:
        of: the layers: `tokens`, `embedding` or names of taps.
        regressor: `convolution` is a 1 x 1 convolution with batch normalization, `linear` one with a bias alone,
            `identity` nothing, where both networks have the same channels.

    Raises:
        UserError: there is no such regressor.
    """

    def __init__(
        self,
        of: Sequence[str] | str = ("tokens",),
        regressor: Literal["convolution", "linear", "identity"] = "convolution",
    ) -> None:
        super().__init__(of)
        self.regressor = one_of("regressor", regressor, ("convolution", "linear", "identity"))

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make a regressor for each layer.

        Raises:
            UserError: the regressor is `identity` and the channels differ.
        """
        super().build(student, teacher)
        self.regressors = nn.ModuleList()
        for own, other in self.layers:
            if self.regressor == "identity":
                if own.width != other.width:
                    raise UserError(
                        f"regressor 'identity' compares channel by channel, but {own.of!r} has {own.width} channels in "
                        f"the student and {other.width} in the teacher: take 'linear' or 'convolution'"
                    )
                self.regressors.append(nn.Identity())
            elif self.regressor == "linear":
                self.regressors.append(CastConv2d(own.width, other.width))
            else:
                self.regressors.append(conv_norm(own.width, other.width))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        losses = []
        for regressor, maps in zip(self.regressors, self.maps(student, teacher), strict=True):
            own, other = to_common_grid(*maps)
            losses.append(F.mse_loss(regressor(own), other))
        return total(losses)
