"""The base of metrics that add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from distill.precision import at_least_float32_after


class FullPrecision(Metric):
    """A metric whose sums keep their type where the module that holds it takes on half precision.

    In bfloat16, a count would stop at 256. On Apple's GPUs, which have no float64, sums are in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        whole = at_least_float32_after(fn)
        if fn(torch.empty(0)).device.type == "mps":
            return super()._apply(lambda tensor: whole(_at_most_float32(tensor)), exclude_state)
        return super()._apply(whole, exclude_state)


def _at_most_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor
