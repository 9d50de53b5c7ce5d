"""The maps that bring both networks' embeddings to one width, and onto one sphere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A linear map, by default with bias: `[..., d_in]` to `[..., d_out]`, in the input's type."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class NormalizedLinear(CastLinear):
    """The same, and the result at length 1."""

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(super().forward(input), dim=-1)


class L2Normalize(nn.Module):
    """The input at length 1: `[..., d]`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=-1)
