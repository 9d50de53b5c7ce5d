from __future__ import annotations

from functools import partial

import pytest
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.fsp import FSP
from distill.testing import STUDENT, TEACHER, check_head
from tests.golden import Q, assert_relative
from tests.two_ranks import RankPool


def seen(low: Tensor, high: Tensor) -> Features:
    return Features(maps={"low": low, "high": high})


def test_value_and_gradient_are_the_golden_ones() -> None:
    cells = Q([4, 5, 8, 8], 6).requires_grad_()
    student = seen(cells, Q([4, 6, 4, 4], 10))
    teacher = seen(Q([4, 5, 8, 8], 7), Q([4, 6, 4, 4], 11))
    head = FSP(["low", "high"])
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    assert_relative("fsp", head(student, teacher, {}), cells)


def test_three_layers_on_different_grids_keep_the_contract(pool: RankPool) -> None:
    student = FeatureSpec(maps={"low": (4, 8, 8), "mid": (5, 4, 4), "high": (7, 3, 5)})
    teacher = FeatureSpec(grid=(4, 4), maps={"low": (9, 6, 6), "mid": (17, 9), "high": (9, 2, 2)})
    check_head(partial(FSP, of=("low", "mid", "high")), student, teacher, run=pool.run, same_widths=True)


def test_different_channels_are_refused() -> None:
    with pytest.raises(UserError, match="equal channels, but 'tokens' has 6 in the student and 9 in the teacher"):
        FSP().build(STUDENT, TEACHER)


def test_one_layer_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"flow between layers: of must name 2 or more, given \['tokens'\]"):
        FSP("tokens")
