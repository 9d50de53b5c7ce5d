"""The map that brings both networks' embeddings onto one sphere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear map, by default with bias, and the result at length 1, in the input's type.

    `[..., d_in]` to `[..., d_out]`.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.normalize(F.linear(input, self.weight.to(input.dtype), bias), dim=-1)


class OnSphere(nn.Module):
    """The input at length 1: `[..., d]`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input, dim=-1)
