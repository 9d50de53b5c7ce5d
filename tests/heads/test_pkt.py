from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.features import Features
from distill.heads.pkt import PKT
from tests.golden import Q, assert_relative


def of(embedding: Tensor) -> Features:
    return Features(embedding=embedding)


def test_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = Q([8, 6], 3).requires_grad_(), Q([8, 12], 4)
    assert_relative("pkt", PKT()(of(student), of(teacher), {}), student)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000), factors=st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_lengths_of_embeddings_do_not_matter(seed: int, factors: list[float]) -> None:
    student, teacher = Q([6, 5], seed), Q([6, 7], seed + 1)
    scaled = torch.tensor(factors, dtype=torch.float64).unsqueeze(1) * student
    torch.testing.assert_close(
        PKT()(of(scaled), of(teacher), {}), PKT()(of(student), of(teacher), {}), rtol=1e-4, atol=1e-7
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000))
def test_it_is_a_divergence_of_distributions_and_not_below_zero(seed: int) -> None:
    assert PKT()(of(Q([6, 5], seed)), of(Q([6, 7], seed + 1)), {}).item() >= 0


def test_two_networks_that_pair_the_images_otherwise_are_told_apart_by_the_literal_figure() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # rows of p_t: (2, 2, 1) / 5 twice and (1, 1, 2) / 4; rows of p_s: (2, 1, 2) / 5, (1, 2, 1) / 4, (2, 1, 2) / 5
    rows = [((2, 2, 1), (2, 1, 2)), ((2, 2, 1), (1, 2, 1)), ((1, 1, 2), (2, 1, 2))]
    expected = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for p, q in rows for a, b in zip(p, q, strict=True))
    assert PKT()(of(student), of(teacher), {}).item() == pytest.approx(expected / 9, rel=1e-5)
