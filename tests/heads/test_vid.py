from __future__ import annotations

import pytest
import torch

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.vid import VID
from tests.golden import Q, assert_relative

TEACHER = Features(maps={"layer": Q([4, 7, 8, 8], 8)})


def built(student: Features, teacher: Features = TEACHER, **arguments: float) -> VID:
    head = VID("layer", **arguments)  # type: ignore[arg-type]
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


def test_value_and_gradient_are_the_golden_ones() -> None:
    cells = Q([4, 5, 8, 8], 6).requires_grad_()
    student = Features(maps={"layer": cells})
    head = built(student)
    weights = (0.5 * Q([7, 5, 1, 1], 12), 0.5 * Q([7, 7, 1, 1], 13), 0.5 * Q([7, 7, 1, 1], 14))
    with torch.no_grad():
        convolutions = [parameter for name, parameter in head.named_parameters() if "means" in name]
        for parameter, weight in zip(convolutions, weights, strict=True):
            parameter.copy_(weight)
        head.log_scales[0].copy_(torch.full((7,), 5 - 1e-5, dtype=torch.float64).expm1().log())
    assert_relative("vid", head(student, TEACHER, {}), cells)


@pytest.mark.parametrize("variance", [0.001, 1.0, 5.0, 200.0])
def test_it_begins_with_the_variance_it_is_given(variance: float) -> None:
    head = built(TEACHER, variance=variance)
    torch.testing.assert_close(head.variances()[0], torch.full((7,), variance).double(), rtol=1e-4, atol=0)


def test_the_variance_is_learned_and_falls_to_the_error_that_is_left() -> None:
    student = Features(maps={"layer": torch.zeros(8, 3, 4, 4).double()})  # of which nothing can be predicted
    scale = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    teacher = Features(maps={"layer": scale * Q([8, 2, 4, 4], 3)})
    head = built(student, teacher)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        head(student, teacher, {}).backward()
        optimizer.step()
    left = teacher["layer"].square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(head.variances()[0].detach(), left, rtol=0.02, atol=0)
    assert head.diagnostics()["variance_layer"].item() == pytest.approx(left.mean().item(), rel=0.02)


def test_a_variance_below_its_least_value_is_refused() -> None:
    with pytest.raises(UserError, match="variance must be above 1e-05, given 0.0"):
        VID(variance=0.0)
