from __future__ import annotations

import pytest
import torch

from distill.features import Features
from distill.heads.sp import SP
from tests.golden import Q, assert_relative


@pytest.mark.parametrize("of", ["tokens", "last"])
def test_value_and_gradient_are_the_golden_ones(of: str) -> None:
    student, teacher = Q([4, 5, 8, 8], 6).requires_grad_(), Q([4, 7, 8, 8], 8)
    seen = [
        Features(tokens=maps.flatten(2).mT, grid=(8, 8), maps={"last": maps}) for maps in (student, teacher)
    ]  # the cells of the last map are the tokens
    assert_relative("sp", SP(of=of)(seen[0], seen[1], {}), student)


def test_a_shift_of_all_features_is_seen() -> None:
    student, teacher = Q([6, 5], 3), Q([6, 5], 4)
    head = SP(of="embedding")
    losses = [head(Features(embedding=x), Features(embedding=teacher), {}) for x in (student, student + 1)]
    assert not torch.allclose(losses[0], losses[1], rtol=1e-2)
