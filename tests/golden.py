"""Figures computed elsewhere from slow literal formulas, and the generator of their inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text())
"""By method; `relatives` holds loss and gradient norm of the methods that this project compares with."""


def Q(shape: list[int], seed: int) -> Tensor:
    """The integer generator: the same float64 numbers on every machine."""
    k = torch.arange(math.prod(shape))
    numbers = (37 * k**2 + 101 * k + 1009 * seed) % 10007
    return (numbers.double() / 5003 - 1).reshape(shape)


def assert_relative(name: str, loss: Tensor, student: Tensor) -> None:
    """Hold a loss, and its gradient's norm with respect to `student`, against a figure in `relatives`."""
    figure = GOLDEN["relatives"][name]
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(figure["loss"], rel=1e-8)
    assert gradient.norm().item() == pytest.approx(figure["gradient_norm"], rel=1e-8)
