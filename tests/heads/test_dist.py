from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import correlation_distance
from distill.heads.dist import DIST
from distill.schedules import Linear, Progress
from tests.golden import Q


def of(logits: Tensor) -> Features:
    return Features(logits)


def literal(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    p, q = (side.div(temperature).softmax(1).tolist() for side in (teacher, student))
    inter = [statistics.correlation(a, b) for a, b in zip(p, q, strict=True)]
    intra = [statistics.correlation([a[k] for a in p], [b[k] for b in q]) for k in range(len(p[0]))]
    return temperature**2 * (beta * (1 - statistics.mean(inter)) + gamma * (1 - statistics.mean(intra)))


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (0.0, 1.0, 2.0)])
def test_it_is_the_literal_formula(beta: float, gamma: float, temperature: float) -> None:
    student, teacher = 2 * Q([8, 10], 1), 3 * Q([8, 10], 2)
    loss = DIST(beta, gamma, temperature)(of(student), of(teacher), {})
    assert loss.item() == pytest.approx(literal(student, teacher, beta, gamma, temperature), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000), shifts=st.lists(st.floats(-20, 20), min_size=6, max_size=6))
def test_a_shift_of_a_samples_logits_changes_nothing(seed: int, shifts: list[float]) -> None:
    student = Q([6, 5], seed).requires_grad_()
    shifted = student.detach() + torch.tensor(shifts, dtype=torch.float64).unsqueeze(1)
    loss = DIST()(of(student), of(shifted), {})
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert gradient.abs().max().item() < 1e-5


def test_probabilities_that_are_an_affine_map_of_the_teachers_have_no_loss() -> None:
    teacher = Q([6, 5], 3).softmax(1)
    student = 0.4 * teacher + 0.6 / 5  # positive, and each row still sums to 1
    assert DIST()(of(student.log()), of(teacher.log()), {}).item() == pytest.approx(0.0, abs=1e-5)


def test_a_student_without_opinion_gets_no_exploding_gradient() -> None:
    student = torch.full((6, 5), 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(DIST()(of(student), of(Q([6, 5], 3).float()), {}), student)
    assert gradient.abs().max().item() < 10


def test_temperature_can_follow_a_schedule() -> None:
    head = DIST(temperature=Linear(1.0, 3.0))
    head.progress = Progress(step=5, steps=10)
    seen = of(2 * Q([8, 10], 1)), of(3 * Q([8, 10], 2))
    assert torch.equal(head(*seen, {}), DIST(temperature=2.0)(*seen, {}))


def test_other_classes_other_scopes_and_no_temperature_are_refused() -> None:
    with pytest.raises(UserError, match="DIST compares class by class, but the student has 5 classes"):
        DIST().build(FeatureSpec(logits=(5,)), FeatureSpec(logits=(6,)))
    with pytest.raises(UserError, match="DIST has no scope 'image'"):
        DIST(scope="image")
    with pytest.raises(UserError, match="temperature must be above 0"):
        DIST(temperature=0.0)


def test_standardized_logits_are_compared_as_any_others() -> None:
    student, teacher = 2 * Q([8, 10], 1), 3 * Q([8, 10], 2)
    z = [(side - side.mean(1, keepdim=True)) / (1e-7 + side.std(1, keepdim=True)) for side in (student, teacher)]
    loss = DIST(temperature=2.0, standardize=True)(of(student), of(teacher), {})
    assert loss.item() == pytest.approx(literal(z[0], z[1], 1.0, 1.0, 2.0), rel=1e-5)
    assert loss.item() != pytest.approx(literal(student, teacher, 1.0, 1.0, 2.0), rel=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_without_standardization_the_loss_is_the_plain_function_bit_for_bit(temperature: float) -> None:
    student, teacher = 2 * Q([8, 10], 1), 3 * Q([8, 10], 2)
    p = [(side / temperature).softmax(-1) for side in (student, teacher)]
    expected = temperature**2 * correlation_distance(p[0], p[1])
    assert torch.equal(DIST(temperature=temperature)(of(student), of(teacher), {}), expected)
