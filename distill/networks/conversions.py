"""Conversions of the names that other programs give to a model's weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]

_TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
"""Names of the functions in timm's model files that convert other programs' checkpoints."""


def conversions(model: nn.Module) -> Iterator[Callable[[State], Any]]:
    """Yield the model's `convert_checkpoint` and timm's filters; those of the class come before its bases'."""
    if callable(convert := getattr(model, "convert_checkpoint", None)):
        yield convert
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    for name in _TIMM_FILTERS:
        function = next((found for module in modules if (found := getattr(module, name, None)) is not None), None)
        if function is None:
            continue
        takes_model = len(inspect.signature(function).parameters) > 1
        yield partial(_call_with_model, function, model) if takes_model else function


def _call_with_model(function: Callable[[State, nn.Module], Any], model: nn.Module, state: State) -> Any:
    return function(state, model)
