"""Projections of features to a given width, optionally normalized."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A linear map that computes in the input's type: `[..., d_in]` to `[..., d_out]`."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class NormalizedLinear(CastLinear):
    """A linear map whose output is normalized to length 1."""

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(super().forward(input), dim=-1)


class L2Normalize(nn.Module):
    """Normalization to length 1: `[..., d]` to the same."""

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=-1)
