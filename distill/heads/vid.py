"""Variational information distillation (Ahn, Hu, Damianou, Lawrence, Dai, 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import require_above
from distill.features import Features, FeatureSpec
from distill.functional import to_common_grid
from distill.heads.base import Batch
from distill.heads.parts.adapters import CastConv2d
from distill.heads.parts.maps import MapHead, total

EPS = 1e-5
"""The lower limit of the variance."""


class VID(MapHead):
    """Negative log-likelihood of the teacher's maps under a Gaussian whose mean is predicted from the student's.

    The mean is predicted by three 1 x 1 convolutions with ReLUs in between; the variance is one number per channel of
    the teacher, `softplus(log_scale) + 1e-5`. Both are learned beside the student, as in the paper and in the CRD
    benchmark's code (mdistiller's passes the variances to no optimizer, so that they keep their initial value). The
    loss omits the constant of the likelihood, so it may fall below 0, and is summed over the layers. The larger grid is
    pooled to the smaller.

    The CRD benchmark uses all stages but the stem as layers, with weight 1.

    Args:
        of: the layers: `tokens`, `embedding` or names of taps.
        variance: initial variance of each channel; 5 as in the CRD benchmark.

    Raises:
        UserError: a variance not above 1e-5.
    """

    def __init__(self, of: Sequence[str] | str = ("tokens",), variance: float = 5.0) -> None:
        super().__init__(of)
        require_above(EPS, variance=variance)
        self.variance = variance

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the predictor of the mean and the variances for each layer."""
        super().build(student, teacher)
        self.means = nn.ModuleList(_mean(layer.width, target.width) for layer, target in self.layers)
        start = self.variance - EPS
        start = start + math.log(-math.expm1(-start))  # the inverse of softplus
        self.log_scales = nn.ParameterList(torch.full((target.width,), start) for _, target in self.layers)

    def variances(self) -> list[Tensor]:
        """Return the variance of each of the teacher's channels, `[d_t]` per layer, with gradient."""
        return [F.softplus(log_scale) + EPS for log_scale in self.log_scales]

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Predict the maps `[B, d_t, h, w]` of each layer from those `[B, d_s, h', w']` of the student."""
        losses = []
        for mean, variance, maps in zip(self.means, self.variances(), self.maps(student, teacher), strict=True):
            student_map, teacher_map = to_common_grid(*maps)
            losses.append(functional.vid(mean(student_map), variance.to(student_map.dtype), teacher_map))
        return total(losses)

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the mean variance of each layer, by its name."""
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
