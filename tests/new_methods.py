"""Figures of the methods since 2022: loss and gradients, on which the public code and a literal formula agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import Q

CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in json.loads((Path(__file__).parent / "new_methods.json").read_text())["cases"]
}
"""By id: expressions of the inputs, parameters, loss, and norm and inner product with `Q(shape, 77)` of gradients."""


def inputs(name: str) -> dict[str, Tensor]:
    """Return the inputs of a case in float64, those that it has gradients of as leaves that require one."""
    case = CASES[name]
    found = {key: torch.as_tensor(eval(text, {"Q": Q})) for key, text in case["inputs"].items()}
    return {key: value.requires_grad_(key in case["wrt"]) for key, value in found.items()}


def assert_case(name: str, loss: Tensor, gradients: Callable[[str], Tensor], scale: float = 1.0) -> None:
    """Hold the loss, times `scale`, and its gradients with respect to the named tensors against a case's figures."""
    figure = CASES[name]
    assert scale * loss.item() == pytest.approx(figure["loss"], rel=1e-10)
    tensors = [gradients(key) for key in figure["wrt"]]
    for key, found in zip(figure["wrt"], torch.autograd.grad(scale * loss, tensors), strict=True):
        expected, flat = figure["grads"][key], found.flatten()
        assert flat.norm().item() == pytest.approx(expected["norm"], rel=1e-10), key
        probe = flat @ Q(list(inputs(name)[key].shape), 77).flatten()
        assert probe.item() == pytest.approx(expected["probe"], rel=1e-10, abs=1e-10 * expected["norm"]), key
