from __future__ import annotations

import pytest
import torch

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.dkd import DKD
from distill.heads.kd import KD
from distill.schedules import Linear, Progress
from tests.golden import Q, assert_relative


def test_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = (2 * Q([8, 10], 1)).requires_grad_(), 3 * Q([8, 10], 2)
    assert_relative("kd", KD()(Features(student), Features(teacher), {}), student)


def test_temperature_can_be_a_schedule() -> None:
    student, teacher = Features(2 * Q([8, 10], 1)), Features(3 * Q([8, 10], 2))
    head = KD(Linear(8.0, 4.0))
    head.progress = Progress(step=100, steps=100)
    assert torch.equal(head(student, teacher, {}), KD(4.0)(student, teacher, {}))
    head.progress = Progress(step=0, steps=100)
    assert torch.equal(head(student, teacher, {}), KD(8.0)(student, teacher, {}))


@pytest.mark.parametrize("kind", [KD, DKD])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(kind: type[KD | DKD], temperature: float) -> None:
    with pytest.raises(UserError, match="temperature must be above 0, given"):
        kind(temperature=temperature)


@pytest.mark.parametrize("kind", [KD, DKD])
def test_different_class_counts_are_refused_and_both_named(kind: type[KD | DKD]) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} .* the student has 10 classes and the teacher 100"):
        kind().build(FeatureSpec(logits=(10,)), FeatureSpec(logits=(100,)))
