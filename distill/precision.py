"""The precision of heads and metrics: at least float32, outside autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from distill.features import Features

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(features: Features) -> Iterator[None]:
    """Disable autocast on the device of the features."""
    tensor = next(_tensors(features), None)
    with nullcontext() if tensor is None else torch.autocast(tensor.device.type, enabled=False):
        yield


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, and others as they are."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def at_least_float32_after(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that does the same, but does not turn a wider type into half precision."""

    def applied(tensor: Tensor) -> Tensor:
        result = function(tensor)
        is_rounded = result.dtype in _HALF and tensor.dtype not in _HALF
        return tensor.to(result.device) if is_rounded else result

    return applied


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a half-precision dtype and back; to `float32`, the least that heads compute in, not at all."""
    return tensor if dtype == torch.float32 else tensor.to(dtype).to(tensor.dtype)


def _tensors(features: Features) -> Any:
    candidates = (features.logits, features.embedding, features.tokens, *features.maps.values())
    return (tensor for tensor in candidates if tensor is not None)
