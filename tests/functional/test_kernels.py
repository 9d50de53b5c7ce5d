from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.functional import (
    channel_discrepancy,
    conditional_probabilities,
    normalized_gram,
    probability_divergence,
    relative_squared_distances,
    taylor_kernel,
)
from tests.golden import Q, assert_relative

SEEDS = st.integers(1, 10_000)
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalized_gram": normalized_gram,
    "conditional_probabilities": conditional_probabilities,
    "taylor_kernel": taylor_kernel,
    "relative_squared_distances": relative_squared_distances,
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def cosine(a: Tensor, b: Tensor) -> float:
    return (a.dot(b) / (a.dot(a) * b.dot(b)).sqrt()).item()


def literal_gram(x: Tensor) -> list[list[float]]:
    products = [[a.dot(b).item() for b in x] for a in x]
    return [[entry / math.sqrt(sum(other**2 for other in row)) for entry in row] for row in products]


def literal_probabilities(x: Tensor) -> list[list[float]]:
    return [[(1 + cosine(a, b)) / sum(1 + cosine(a, c) for c in x) for b in x] for a in x]


def literal_series(x: Tensor) -> list[list[float]]:
    def entry(c: float) -> float:
        return math.exp(-0.8) * sum(0.8**p / math.factorial(p) * c**p for p in range(3))

    return [[entry(cosine(a, b)) for b in x] for a in x]


def literal_distances(x: Tensor) -> list[list[float]]:
    squared = [[(a - b).square().sum().item() for b in x] for a in x]
    return [[entry / max(map(max, squared)) for entry in row] for row in squared]


LITERAL = dict(zip(KERNELS, (literal_gram, literal_probabilities, literal_series, literal_distances), strict=True))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [[7, 3], [2, 2], [5, 1], [4, 20]])
def test_a_kernel_is_that_of_the_literal_formula(name: str, shape: list[int]) -> None:
    x = Q(shape, 3)
    eps = 1e-6 if name == "conditional_probabilities" else 1e-12  # the public code adds 1e-7 to the lengths
    expected = torch.tensor(LITERAL[name](x), dtype=torch.float64)
    torch.testing.assert_close(KERNELS[name](x), expected, rtol=eps, atol=eps)


@every_kernel
def test_leading_dimensions_are_independent_of_each_other(kernel: Callable[[Tensor], Tensor]) -> None:
    x = Q([2, 3, 5, 4], 9)
    each = torch.stack([torch.stack([kernel(x[a, b]) for b in range(3)]) for a in range(2)])
    torch.testing.assert_close(kernel(x), each, rtol=1e-12, atol=1e-13)


@every_kernel
def test_gradients_are_the_derivatives(kernel: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(kernel, (Q([2, 5, 3], 6).requires_grad_(),))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.1, 100), order=st.permutations(range(6)))
def test_scale_and_rotation_change_no_kernel_and_a_permutation_permutes_it(
    seed: int, scale: float, order: list[int]
) -> None:
    x = Q([6, 5], seed)
    moved = scale * (x @ torch.linalg.qr(Q([5, 5], seed + 1)).Q)[order]
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(moved), kernel(x)[order][:, order], rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, factors=st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_kernels_of_cosines_do_not_see_the_length_of_any_vector(seed: int, factors: list[float]) -> None:
    x = Q([6, 5], seed)
    scaled = torch.tensor(factors, dtype=torch.float64).unsqueeze(1) * x
    for kernel in (conditional_probabilities, taylor_kernel):
        torch.testing.assert_close(kernel(scaled), kernel(x), rtol=1e-5, atol=1e-6)


def test_rows_have_length_one_or_sum_one() -> None:
    x = Q([3, 7, 4], 2)
    ones = torch.ones(3, 7, dtype=torch.float64)
    torch.testing.assert_close(normalized_gram(x).norm(dim=-1), ones)
    torch.testing.assert_close(conditional_probabilities(x).sum(dim=-1), ones)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_without_length_gets_no_exploding_gradient(
    kernel: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = Q([6, 4], 3).to(dtype)
    x[2] = 0
    x.requires_grad_()
    found = kernel(x)
    (gradient,) = torch.autograd.grad((found * Q([6, 6], 4).to(dtype)).sum(), x)
    assert bool(found.isfinite().all())
    assert gradient.abs().max().item() < 100


@every_kernel
def test_a_value_that_is_not_a_number_is_not_hidden(kernel: Callable[[Tensor], Tensor]) -> None:
    x = Q([4, 3], 1)
    x[2, 1] = math.nan
    assert bool(kernel(x).isnan().any())


@pytest.mark.parametrize("d", [3, 64, 768])
def test_opposite_vectors_are_no_negative_probability_in_float32(d: int) -> None:
    x = torch.randn(200, d, generator=torch.Generator().manual_seed(0))
    probabilities = conditional_probabilities(torch.stack([x, -x], dim=1).requires_grad_())
    assert probabilities.min().item() >= 0
    loss = probability_divergence(probabilities, conditional_probabilities(torch.stack([x, x + 1], dim=1)))
    assert bool(loss.isfinite())


def test_a_long_taylor_series_is_the_gaussian_kernel() -> None:
    x = Q([6, 5], 3)
    unit = x / x.norm(dim=1, keepdim=True)
    expected = torch.exp(-1.3 * torch.cdist(unit, unit).square())
    torch.testing.assert_close(taylor_kernel(x, gamma=1.3, order=25), expected, rtol=1e-10, atol=0)


def test_the_divergence_of_probabilities_is_that_of_the_literal_formula() -> None:
    p, q = conditional_probabilities(Q([5, 3], 1)), conditional_probabilities(Q([5, 4], 2))
    expected = sum(a * math.log(a / b) for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)) / 25
    assert probability_divergence(q, p).item() == pytest.approx(expected, rel=1e-4)
    assert probability_divergence(p, p).item() == 0.0


def cells(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


def literal_discrepancy(student: Tensor, teacher: Tensor) -> float:
    """Over cells `[N, c]` and `[N, C]`, channel by channel."""

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        return sum(cosine(a, b) ** 2 for a in x.T for b in y.T) / (x.shape[1] * y.shape[1])

    return mean_kernel(student, student) + mean_kernel(teacher, teacher) - 2 * mean_kernel(student, teacher)


def test_discrepancy_and_its_gradient_are_the_golden_ones() -> None:
    student, teacher = Q([4, 5, 8, 8], 6).requires_grad_(), Q([4, 7, 8, 8], 8)
    assert_relative("nst", channel_discrepancy(cells(student), cells(teacher)).mean(), student)


# as many cells as channels decide which of two equal forms is computed
@pytest.mark.parametrize(("n", "c", "other"), [(16, 5, 7), (4, 9, 3), (4, 3, 9), (6, 6, 6), (7, 6, 6), (3, 1, 1)])
def test_discrepancy_is_that_of_the_literal_formula(n: int, c: int, other: int) -> None:
    student, teacher = Q([3, n, c], 3), Q([3, n, other], 4)
    expected = [literal_discrepancy(s, t) for s, t in zip(student, teacher, strict=True)]
    assert channel_discrepancy(student, teacher).tolist() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 9), factors=st.lists(st.floats(-5, 5).filter(lambda f: abs(f) > 0.1), min_size=5))
def test_discrepancy_does_not_see_order_scale_and_sign_of_the_channels(seed: int, n: int, factors: list[float]) -> None:
    student, teacher = Q([2, n, 5], seed), Q([2, n, 4], seed + 1)
    changed = (student * torch.tensor(factors[:5], dtype=torch.float64))[..., [3, 1, 0, 4, 2]]
    torch.testing.assert_close(
        channel_discrepancy(changed, teacher), channel_discrepancy(student, teacher), rtol=1e-8, atol=1e-10
    )


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 9))
def test_discrepancy_is_no_less_than_zero_and_zero_for_equal_channels(seed: int, n: int) -> None:
    student, teacher = Q([2, n, 5], seed), Q([2, n, 4], seed + 1)
    assert channel_discrepancy(student, teacher).min().item() > -1e-12
    repeated = torch.cat([student, student], dim=-1)
    assert channel_discrepancy(student, repeated).abs().max().item() < 1e-12


@pytest.mark.parametrize("n", [3, 9])
def test_a_channel_that_never_fires_gets_no_exploding_gradient(n: int) -> None:
    student = Q([2, n, 5], 3).float()
    student[:, :, 2] = 0
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(channel_discrepancy(student, Q([2, n, 4], 4).float()).sum(), student)
    assert gradient.abs().max().item() < 100
