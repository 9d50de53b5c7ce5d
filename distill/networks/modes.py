"""Passes of a network in eval mode, between steps of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in eval mode; afterwards each of its layers is in its own mode of before.

    A layer that was frozen by its `eval()` stays frozen, also if the body raises.
    """
    modes = {layer: layer.training for layer in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
