"""The map that brings both networks' embeddings onto one sphere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear map with bias, and the result at length 1: `[..., d_in]` to `[..., d_out]`, in the input's type."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (parameter.to(input.dtype) for parameter in (self.weight, self.bias))
        return F.normalize(F.linear(input, weight, bias), dim=-1)


class OnSphere(nn.Module):
    """The input at length 1: `[..., d]`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=-1)
