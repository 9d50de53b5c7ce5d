"""Variational information distillation (Ahn, Hu, Damianou, Lawrence, Dai, 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import to_common_grid
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d
from distill.heads.parts.maps import MapHead, total

EPS = 1e-5
"""The least variance."""


class VID(MapHead):
    """How likely the teacher's maps are under a Gaussian whose mean is predicted from the student's.

    The mean comes from three 1 x 1 convolutions with ReLUs between them, the variance is one number for each of the
    teacher's channels, `softplus(log_scale) + 1e-5`. Both are learned beside the student (in the public code the
    variance is given to no optimizer and stays as it began). The loss is the negative log-likelihood without its
    constant, so it may fall below 0, summed over the layers. The larger grid is pooled to the smaller.

    The CRD benchmark gave it all stages but the stem as layers, and the weight 1.

    Args:
        of: the layers: `tokens`, `embedding` or names of taps.
        variance: that of each channel at the beginning; 5 as in the CRD benchmark.

    Raises:
        UserError: the variance is not above 1e-5.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",), variance: float = 5.0) -> None:
        super().__init__(of)
        if not variance > EPS:
            raise UserError(f"variance must be above {EPS}, given {variance}")
        self.variance = variance

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make, for each layer, what predicts the mean, and the variances."""
        super().build(student, teacher)
        self.means = nn.ModuleList(_mean(own.width, other.width) for own, other in self.layers)
        start = self.variance - EPS
        start = start + math.log(-math.expm1(-start))  # the inverse of softplus
        self.log_scales = nn.ParameterList(torch.full((other.width,), start) for _, other in self.layers)

    def variances(self) -> list[Tensor]:
        """The variance of each of the teacher's channels, `[d_t]` for each layer, with gradient."""
        return [F.softplus(log_scale) + EPS for log_scale in self.log_scales]

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Predict the maps `[B, d_t, h, w]` of each layer from those `[B, d_s, h', w']` of the student."""
        losses = []
        for mean, variance, maps in zip(self.means, self.variances(), self.maps(student, teacher), strict=True):
            own, other = to_common_grid(*maps)
            losses.append(functional.vid(mean(own), variance.to(own.dtype), other))
        return total(losses)

    def diagnostics(self) -> dict[str, Tensor]:
        """The mean variance of each layer, by its name."""
        means = (variance.detach().mean() for variance in self.variances())
        return {f"variance_{name}": mean for name, mean in zip(self.of, means, strict=True)}


def _mean(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        CastConv2d(channels, width, bias=False),
        nn.ReLU(),
        CastConv2d(width, width, bias=False),
        nn.ReLU(),
        CastConv2d(width, width, bias=False),
    )
