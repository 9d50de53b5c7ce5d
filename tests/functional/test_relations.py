from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.functional import angle_cosines, normalized_distances, pack_symmetric, pair_distances, unpack_symmetric
from tests.golden import Q

SEEDS = st.integers(1, 10_000)


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True)))


def cosine(vertex: Tensor, a: Tensor, b: Tensor) -> float:
    lengths = distance(vertex, a) * distance(vertex, b)
    return (a - vertex).dot(b - vertex).item() / lengths if lengths else 0.0


def literal_distances(x: Tensor) -> Tensor:
    return torch.tensor([[distance(a, b) for b in x] for a in x], dtype=torch.float64)


def literal_cosines(x: Tensor) -> Tensor:
    return torch.tensor([[[cosine(v, a, b) for b in x] for a in x] for v in x], dtype=torch.float64)


def rotation(d: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(Q([d, d], seed)).Q
    return basis


@pytest.mark.parametrize("shape", [[7, 3], [2, 2], [5, 1], [4, 20]])
def test_distances_and_cosines_are_those_of_the_literal_formulas(shape: list[int]) -> None:
    x = Q(shape, 3)
    torch.testing.assert_close(pair_distances(x), literal_distances(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(angle_cosines(x), literal_cosines(x), rtol=1e-10, atol=1e-12)


def test_first_index_of_a_cosine_is_the_vertex() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    cosines = angle_cosines(x)
    assert cosines[0, 1, 2].item() == pytest.approx(0.0, abs=1e-12)
    assert cosines[1, 0, 2].item() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("function", [pair_distances, normalized_distances, angle_cosines])
def test_leading_dimensions_are_independent_of_each_other(function: Callable[[Tensor], Tensor]) -> None:
    x = Q([2, 3, 5, 4], 9)
    each = torch.stack([torch.stack([function(x[a, b]) for b in range(3)]) for a in range(2)])
    torch.testing.assert_close(function(x), each, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagonals_and_duplicates_are_exactly_zero_with_a_finite_gradient(dtype: torch.dtype) -> None:
    x = (Q([6, 300], 4).to(dtype) + 50)[[0, 1, 2, 3, 0, 1]].requires_grad_()
    distances, cosines = pair_distances(x), angle_cosines(x)
    assert distances.diagonal().tolist() == [0.0] * 6
    assert distances[0, 4].item() == distances[1, 5].item() == 0.0
    assert bool((distances[0, 1:4] > 1).all())
    for i, j in ((0, 0), (0, 4), (5, 1), (3, 3)):
        assert not cosines[i, j].any()
        assert not cosines[i, :, j].any()
    (gradient,) = torch.autograd.grad(normalized_distances(x).square().sum() + cosines.sum(), x)
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
def test_tokens_that_are_all_equal_have_no_distances_and_no_gradient(value: float) -> None:
    x = torch.full((2, 4, 3), value, requires_grad=True)
    for relation in (normalized_distances(x), angle_cosines(x)):
        assert not relation.any()
        (gradient,) = torch.autograd.grad(relation.sum(), x)
        assert not gradient.any()


def test_one_token_alone_is_related_to_nothing() -> None:
    x = Q([3, 1, 4], 2)
    assert normalized_distances(x).tolist() == [[[0.0]]] * 3
    assert angle_cosines(x).tolist() == [[[[0.0]]]] * 3


def test_normalized_distances_have_the_mean_one_over_the_pairs_that_are_apart() -> None:
    x = Q([6, 3], 8)[[0, 1, 2, 3, 4, 0]]
    distances = normalized_distances(x)
    apart = distances[distances > 0]
    assert len(apart) == 6 * 5 - 2
    assert apart.mean().item() == pytest.approx(1.0, rel=1e-12)


def test_a_value_that_is_not_a_number_is_not_hidden() -> None:
    x = Q([4, 3], 1)
    x[2, 1] = math.nan
    assert bool(pair_distances(x).isnan().any())
    assert bool(normalized_distances(x).isnan().any())
    assert bool(angle_cosines(x).isnan().any())


@pytest.mark.parametrize("apart", [1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("d", [8, 64, 192])
def test_cosines_between_tokens_that_differ_by_rounding_stay_cosines(apart: float, d: int) -> None:
    x = (Q([8, d], 1).repeat(3, 1) + apart * Q([24, d], 2)).float()
    assert angle_cosines(x).abs().max().item() < 1.5


def test_a_far_origin_costs_no_digits() -> None:
    x = Q([6, 8], 5).float() + 1000
    torch.testing.assert_close(pair_distances(x), literal_distances(x).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", [pair_distances, normalized_distances, angle_cosines])
def test_gradients_are_the_derivatives(function: Callable[[Tensor], Tensor]) -> None:
    x = Q([2, 5, 3], 6).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_rotation_shift_and_scale_change_no_relation(seed: int, scale: float, shift: float) -> None:
    x = Q([6, 5], seed)
    moved = scale * (x @ rotation(5, seed + 1)) + shift
    torch.testing.assert_close(pair_distances(moved), scale * pair_distances(x), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(normalized_distances(moved), normalized_distances(x), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(angle_cosines(moved), angle_cosines(x), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, order=st.permutations(range(6)))
def test_relations_follow_a_permutation_of_the_tokens(seed: int, order: list[int]) -> None:
    x = Q([6, 4], seed)
    torch.testing.assert_close(normalized_distances(x[order]), normalized_distances(x)[order][:, order])
    torch.testing.assert_close(angle_cosines(x[order]), angle_cosines(x)[order][:, order][:, :, order])


@pytest.mark.parametrize("function", [pair_distances, normalized_distances, angle_cosines])
def test_absent_tokens_take_no_part(function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    x, present = Q([2, 6, 4], 3), torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    relations = function(x, present)
    for tokens, here, relation in zip(x, present, relations, strict=True):
        expected = function(tokens[here], None)
        rows = torch.arange(6)[here]
        found = relation[torch.meshgrid(*[rows] * relation.ndim, indexing="ij")]
        torch.testing.assert_close(found, expected)
        assert relation.count_nonzero() == expected.count_nonzero()


@given(size=st.integers(1, 12), sets=st.integers(0, 3))
def test_a_packed_matrix_is_unpacked_bit_for_bit(size: int, sets: int) -> None:
    matrix = Q([sets, size, 3], size)
    symmetric = pack_symmetric(matrix @ matrix.mT)
    assert symmetric.shape == (sets, size * (size + 1) // 2)
    unpacked = unpack_symmetric(symmetric)
    assert torch.equal(unpacked.tril(), (matrix @ matrix.mT).tril())
    assert torch.equal(unpacked, unpacked.mT)
