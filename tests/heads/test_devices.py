"""Heads in float32 on a device against float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.heads import Head, shipped
from distill.testing import Result, evaluate
from tests.heads.test_contract import case_of


def far(given: Result, expected: Result) -> dict[str, float]:
    """Relative distance of each tensor, by name; gradients relative to the largest of them."""
    gradients, others = ({**result.student, **result.parameters} for result in (given, expected))
    largest = max(float(other.norm()) for other in others.values())
    found = {name: float((gradient - others[name]).norm()) / largest for name, gradient in gradients.items()}
    return {"loss": float((given.loss - expected.loss).abs() / expected.loss.abs()), **found}


@pytest.mark.parametrize("make", shipped().values(), ids=shipped().keys())
def test_a_head_in_float32_has_the_loss_and_gradients_of_float64_on_the_cpu(
    make: type[Head], device: torch.device
) -> None:
    exact = case_of(make)
    case = replace(exact, device=device)
    expected = evaluate(exact.head(), exact.sample())
    given = evaluate(case.head(torch.float32), case.sample(dtype=torch.float32))
    assert given.loss.device.type == device.type
    distances = far(given.to("cpu", torch.float64), expected)
    assert max(distances.values()) < 2e-4, distances
