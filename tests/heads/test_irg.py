from __future__ import annotations

import pytest
from torch import Tensor

from distill.features import Features
from distill.heads.irg import IRG
from tests.golden import Q


def literal(student: Tensor, teacher: Tensor) -> float:
    def edges(x: Tensor) -> list[float]:
        squared = [(a - b).square().sum().item() for a in x for b in x]
        return [entry / max(squared) for entry in squared]

    pairs = list(zip(edges(student), edges(teacher), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


def test_it_is_the_literal_formula() -> None:
    student, teacher = Q([8, 6], 3), Q([8, 12], 4)
    loss = IRG()(Features(embedding=student), Features(embedding=teacher), {})
    assert loss.item() == pytest.approx(literal(student, teacher), rel=1e-10)


def test_two_images_have_one_edge_which_is_always_the_largest() -> None:
    loss = IRG()(Features(embedding=Q([2, 6], 3)), Features(embedding=Q([2, 12], 4)), {})
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
