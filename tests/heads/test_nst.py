from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import channel_discrepancy
from distill.heads.nst import NST
from distill.testing import check_head
from tests.golden import Q, assert_relative
from tests.two_ranks import RankPool


def built(student: Features, teacher: Features, of: str = "last") -> NST:
    head = NST(of=of)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head


def test_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = Q([4, 5, 8, 8], 6).requires_grad_(), Q([4, 7, 8, 8], 8)
    seen = Features(maps={"last": student}), Features(maps={"last": teacher})
    assert_relative("nst", built(*seen)(*seen, {}), student)


def test_maps_keep_the_contract(pool: RankPool) -> None:
    check_head(partial(NST, of="last"), run=pool.run)


@pytest.mark.parametrize(("own", "other", "common"), [((8, 8), (4, 4), (4, 4)), ((4, 6), (7, 5), (4, 5))])
def test_the_larger_map_is_pooled_to_the_smaller(own: Any, other: Any, common: Any) -> None:
    maps = Q([2, 5, *own], 3), Q([2, 7, *other], 4)
    seen = [Features(maps={"last": side}) for side in maps]
    cells = [F.adaptive_avg_pool2d(side, common).flatten(2).mT for side in maps]
    loss = built(seen[0], seen[1])(seen[0], seen[1], {})
    torch.testing.assert_close(loss, channel_discrepancy(cells[0], cells[1]).mean())


def test_a_map_is_compared_with_the_patch_tokens_of_a_transformer() -> None:
    maps, patches = Q([2, 5, 4, 4], 3), Q([2, 36, 7], 4)
    block = torch.cat([100 * Q([2, 1, 7], 9), patches], dim=1)  # its class token is dropped
    seen = Features(maps={"x": maps}), Features(tokens=patches, grid=(6, 6), maps={"x": block})
    on_grid = F.adaptive_avg_pool2d(patches.mT.reshape(2, 7, 6, 6), (4, 4))
    expected = channel_discrepancy(maps.flatten(2).mT, on_grid.flatten(2).mT).mean()
    torch.testing.assert_close(built(*seen, of="x")(*seen, {}), expected)


def test_images_do_not_see_each_other() -> None:
    seen = [Features(maps={"last": Q([3, c, 4, 4], c)}) for c in (5, 7)]
    head = built(seen[0], seen[1])
    alone = [[Features(maps={"last": side["last"][[i]]}) for side in seen] for i in range(3)]
    each = [head(student, teacher, {}) for student, teacher in alone]
    torch.testing.assert_close(head(seen[0], seen[1], {}), torch.stack(each).mean())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((6, 1, 1), (6, 4, 4), "'x' has 1 x 1 cells in the student and 4 x 4 in the teacher"),
        ((6, 1, 4), (6, 4, 1), "name layers with at least 2 common cells"),
        ((6,), (6, 4, 4), "'x' has 1 x 1 cells in the student and 4 x 4 in the teacher"),
        ((6, 4, 4), (15, 6), r"'x' of the teacher has the shape \(15, 6\)"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_the_first_step(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NST(of="x").build(FeatureSpec(maps={"x": student}), FeatureSpec(maps={"x": teacher}))
