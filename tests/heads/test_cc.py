from __future__ import annotations

import math
from typing import Any

import pytest
from torch import Tensor

from distill.errors import UserError
from distill.features import Features
from distill.heads.cc import CC
from tests.golden import Q


def literal(student: Tensor, teacher: Tensor, gamma: float, order: int) -> float:
    """1 / B^2 |K_s - K_t|^2, entry by entry."""

    def kernel(a: Tensor, b: Tensor) -> float:
        cosine = float(a.dot(b) / (a.norm() * b.norm()))
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))

    pairs = [(i, j) for i in range(len(student)) for j in range(len(student))]
    return sum((kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i, j in pairs) / len(pairs)


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.5, 1), (0.2, 5)])
def test_it_is_the_literal_formula(gamma: float, order: int) -> None:
    student, teacher = Q([8, 6], 3), Q([8, 12], 4)
    loss = CC(gamma=gamma, order=order)(Features(embedding=student), Features(embedding=teacher), {})
    assert loss.item() == pytest.approx(literal(student, teacher, gamma, order), rel=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"gamma": 0}, "gamma must be above 0, given 0"), ({"order": 0}, "order must be at least 1, given 0")],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CC(**arguments)
