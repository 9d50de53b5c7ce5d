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
    """Mean squared difference between the teacher's maps and the student's, after a regressor to as many channels.

    This is feature matching in general: on a stage of both networks it is FitNets' hint, on `tokens` or `embedding` the
    common feature loss. The loss is the sum over the layers; the larger grid is first pooled to the smaller.

    The CRD benchmark uses the second stage as the only layer, with weight 100. Its regressor ends in a ReLU, as the
    teacher's maps there do; this one does not, since tokens and embeddings can be negative. The paper first trains the
    student up to the hint: give the term the weight `Until`, and the task and the other terms `After`.

    Args:
        of: the layers: `tokens`, `embedding` or names of taps.
        regressor: `convolution` is a 1 x 1 convolution with batch normalization, `linear` a 1 x 1 convolution with
            bias, `identity` none, which requires equal channels.

    Raises:
        UserError: an unknown regressor.
    """

    def __init__(
        self,
        of: Sequence[str] | str = ("tokens",),
        regressor: Literal["convolution", "linear", "identity"] = "convolution",
    ) -> None:
        super().__init__(of)
        self.regressor = one_of("regressor", regressor, ("convolution", "linear", "identity"))

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build a regressor for each layer.

        Raises:
            UserError: the regressor is `identity` and the channels differ.
        """
        super().build(student, teacher)
        self.regressors = nn.ModuleList()
        for layer, target in self.layers:
            if self.regressor == "identity":
                if layer.width != target.width:
                    raise UserError(
                        f"regressor 'identity' compares channel by channel, but {layer.of!r} has {layer.width} "
                        f"channels in the student and {target.width} in the teacher: take 'linear' or 'convolution'"
                    )
                self.regressors.append(nn.Identity())
            elif self.regressor == "linear":
                self.regressors.append(CastConv2d(layer.width, target.width))
            else:
                self.regressors.append(conv_norm(layer.width, target.width))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the maps `[B, d_s, h, w]` and `[B, d_t, h', w']` of each layer."""
        losses = []
        for regressor, maps in zip(self.regressors, self.maps(student, teacher), strict=True):
            student_map, teacher_map = to_common_grid(*maps)
            losses.append(F.mse_loss(regressor(student_map), teacher_map))
        return total(losses)
