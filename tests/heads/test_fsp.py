from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
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
    spec = FeatureSpec(maps={"stage1": (4, 8, 8)})
    for refuse in (FSP("stage*").check, FSP("stage*").build):
        with pytest.raises(UserError, match=r"of must name 2 or more, given \['stage1'\]"):
            refuse(spec, spec)


def test_one_pattern_stands_for_the_stages_of_the_public_code() -> None:
    maps = {"stem": Q([4, 5, 8, 8], 6), "stage1": Q([4, 6, 4, 4], 10), "stage2": Q([4, 3, 2, 2], 11)}
    student, teacher = Features(maps=maps), Features(maps=maps).apply(torch.square)
    losses = []
    for of in ("st*", ["stem", "stage*"], ["stem", "stage1", "stage2"]):
        head = FSP(of)
        head.check(FeatureSpec.of(student), FeatureSpec.of(teacher))
        head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
        losses.append(head(student, teacher, {}))
    flows = [
        [
            torch.einsum("bchw,bdhw->bcd", F.adaptive_avg_pool2d(low, high.shape[2:]), high) / high[0, 0].numel()
            for low, high in pairwise(features.maps.values())
        ]
        for features in (student, teacher)
    ]
    expected = torch.stack([(one - other).square().mean() for one, other in zip(*flows, strict=True)]).sum()
    torch.testing.assert_close(torch.stack(losses), expected.expand(3))
