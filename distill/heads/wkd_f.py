"""Wasserstein distance between Gaussians of features: WKD-F (Lv, Yang, Li, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distill import functional
from distill.errors import UserError, require_above, require_at_least
from distill.features import Features, FeatureSpec
from distill.heads.base import Batch
from distill.heads.parts.adapters import GlobalBatchNorm2d, resizing_conv
from distill.heads.parts.map_reader import MapReader
from distill.heads.parts.maps import MapHead, total


class WKDF(MapHead):
    """Squared Wasserstein distance between Gaussians of both networks' features, with the means weighted.

    gamma D_mean + D_cov with D_mean = |mu_s - mu_t|^2 and, for diagonal covariances, D_cov = |sigma_s - sigma_t|^2:
    mu and sigma are mean and standard deviation of each channel over the pixels of an image, or of each cell of a grid
    on it; sums over the channels, means over cells and images; gamma is `ratio`.

    The student's map first goes through a convolution to the teacher's channels, batch normalization and a ReLU. To a
    grid of half or twice as many cells per side the convolution is 3 x 3 with stride 2, or transposed and 4 x 4, as in
    the authors' code; between all other grids it is 1 x 1, since only mean and deviation are compared. (There it has a
    bias, which the batch normalization cancels, and between other grids a kernel as large as the difference.)

    The authors' code for CIFAR-100 reads the last map, before it is pooled: for ResNet-32x4 and ResNet-8x4 the weight
    is 0.08 with ratio 4 and grid 1, for WRN-40-2 and ShuffleNetV1 0.3 with ratio 3 and grid 4. It falls to 0 along half
    a cosine wave from epoch 150 to 240, once per epoch there.

    Args:
        of: the layers: `tokens` or names of taps; the loss is the sum over them.
        grid: cells per side, each with a Gaussian of its own; each must hold two pixels of the compared maps.
        ratio: weight of the means beside the standard deviations; 4 as in the authors' code.
        eps: added to the variances; 1e-5 likewise.
        relu: whether the regressor ends in a ReLU, as there; `False` for teachers whose maps can be negative, such as a
            transformer's tokens.

    Raises:
        UserError: a grid below 1, or an eps or ratio not above 0.
    """

    def __init__(
        self,
        of: Sequence[str] | str = ("tokens",),
        grid: int = 1,
        ratio: float = 4.0,
        eps: float = 1e-5,
        relu: bool = True,
    ) -> None:
        super().__init__(of)
        require_at_least(1, grid=grid)
        require_above(0, ratio=ratio, eps=eps)
        self.grid, self.ratio, self.eps, self.relu = grid, ratio, eps, relu

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build a regressor for each layer.

        Raises:
            UserError: a cell of the grid would hold fewer than two pixels.
        """
        super().build(student, teacher)
        self.regressors = nn.ModuleList(self._regressor(layer, target) for layer, target in self.layers)

    def summarize_teacher(self, teacher: Features, batch: Batch) -> Features:
        """Return the moments of each layer's cells, `[B, d_t, g, g]`."""
        moments: dict[str, Tensor] = {}
        for _, read in self.layers:
            mean, deviation = functional.cell_moments(read(teacher), self.grid, self.eps)
            moments |= {f"{read.of}.mean": mean, f"{read.of}.deviation": deviation}
        return Features(maps=moments)

    def summary_key(self) -> Mapping[str, Any]:
        """Return the layers and the settings of the moments."""
        return {"of": [read.of for _, read in self.layers], "grid": self.grid, "eps": self.eps}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Compare the student's maps `[B, d_s, h, w]` of each layer with the teacher's moments."""
        losses = []
        for regressor, (read, target) in zip(self.regressors, self.layers, strict=True):
            mean, deviation = functional.cell_moments(regressor(read(student)), self.grid, self.eps)
            losses.append(self.ratio * functional.moment_difference(mean, teacher[f"{target.of}.mean"]))
            losses.append(functional.moment_difference(deviation, teacher[f"{target.of}.deviation"]))
        return total(losses)

    def _regressor(self, layer: MapReader, target: MapReader) -> nn.Module:
        convolution, grid = resizing_conv(layer.width, target.width, layer.grid, target.grid)
        for side, name, (height, width) in (("student", layer.of, grid), ("teacher", target.of, target.grid)):
            if -(-height // self.grid) * -(-width // self.grid) < 2:
                raise UserError(
                    f"WKDF needs 2 pixels in each cell, but grid {self.grid} leaves 1 of the {height} x {width} of "
                    f"{name!r} in the {side}: give a smaller grid, or a layer with more cells"
                )
        activation = [nn.ReLU()] if self.relu else []
        return nn.Sequential(convolution, GlobalBatchNorm2d(target.width), *activation)
