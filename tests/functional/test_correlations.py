from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.functional import adjacent_congruence, correlation_distance, pearson
from tests.golden import Q, assert_relative

SEEDS = st.integers(1, 10_000)


def correlation(x: Tensor, y: Tensor) -> float:
    return statistics.correlation(x.tolist(), y.tolist())


@pytest.mark.parametrize("n", [2, 3, 20])
def test_the_correlation_is_that_of_the_standard_library(n: int) -> None:
    x, y = Q([4, n], 1), Q([4, n], 2)
    expected = [correlation(a, b) for a, b in zip(x, y, strict=True)]
    assert pearson(x, y, eps=0.0).tolist() == pytest.approx(expected, rel=1e-9)
    lengths = [
        math.sqrt(statistics.pvariance(a.tolist()) * statistics.pvariance(b.tolist())) * n
        for a, b in zip(x, y, strict=True)
    ]
    damped = [r * length / (length + 1e-8) for r, length in zip(expected, lengths, strict=True)]
    assert pearson(x, y).tolist() == pytest.approx(damped, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_a_positive_affine_map_changes_no_correlation_and_a_negative_one_its_sign(
    seed: int, scale: float, shift: float
) -> None:
    x, y = Q([3, 7], seed), Q([3, 7], seed + 1)
    found = pearson(x, y, eps=0.0)
    torch.testing.assert_close(pearson(scale * x + shift, y, eps=0.0), found, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pearson(shift - scale * x, y, eps=0.0), -found, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pearson(x, scale * x + shift, eps=0.0), torch.ones_like(found), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
def test_a_constant_series_correlates_with_nothing_and_has_no_gradient(dtype: torch.dtype, value: float) -> None:
    x, y = Q([2, 10], 1).to(dtype), Q([2, 10], 2).to(dtype)
    x[0] = value
    x.requires_grad_()
    for found in (pearson(x, y), pearson(y, x)):
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert found[0].item() == 0.0
        assert not gradient[0].any()
        assert bool(gradient[1].any())


def test_dist_is_that_of_the_literal_formula() -> None:
    student, teacher = Q([8, 10], 1).softmax(1), Q([8, 10], 2).softmax(1)
    inter = [correlation(a, b) for a, b in zip(student, teacher, strict=True)]
    intra = [correlation(a, b) for a, b in zip(student.T, teacher.T, strict=True)]
    expected = 0.7 * (1 - sum(inter) / 8) + 1.9 * (1 - sum(intra) / 10)
    assert correlation_distance(student, teacher, beta=0.7, gamma=1.9).item() == pytest.approx(expected, rel=1e-5)


def test_dist_is_symmetric_in_samples_and_classes() -> None:
    student, teacher = Q([6, 6], 1), Q([6, 6], 2)
    torch.testing.assert_close(
        correlation_distance(student, teacher, 2.0, 5.0), correlation_distance(student.T, teacher.T, 5.0, 2.0)
    )


def test_gradients_are_the_derivatives() -> None:
    assert torch.autograd.gradcheck(correlation_distance, (Q([5, 4], 1).requires_grad_(), Q([5, 4], 2)))


def test_congruence_of_adjacent_samples_and_its_gradient_are_the_golden_ones() -> None:
    student, teacher = Q([8, 6], 3).requires_grad_(), Q([8, 6], 5)
    assert_relative("cc", adjacent_congruence(student, teacher), student)


def test_congruence_of_adjacent_samples_is_that_of_the_literal_formula() -> None:
    student, teacher = Q([5, 3], 1).tolist(), Q([5, 3], 2).tolist()
    expected = sum(
        abs(student[i][c] - teacher[i][c]) * abs(student[i + 1][c] - teacher[i + 1][c])
        for i in range(4)
        for c in range(3)
    )
    assert adjacent_congruence(Q([5, 3], 1), Q([5, 3], 2)).item() == pytest.approx(expected / 4, rel=1e-12)


def test_one_sample_alone_has_no_neighbor() -> None:
    student = Q([1, 3], 1).requires_grad_()
    loss = adjacent_congruence(student, Q([1, 3], 2))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0
    assert not gradient.any()
