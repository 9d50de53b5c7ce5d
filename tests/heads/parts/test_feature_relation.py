"""The common behavior of heads that relate features of any kind, and the golden figures of each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.cc import CC
from distill.heads.irg import IRG
from distill.heads.parts.feature_relation import FeatureRelation
from distill.heads.pkt import PKT
from distill.heads.rkd import RKD
from distill.heads.sp import SP
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool

HEADS: dict[str, Any] = {"CC": CC, "IRG": IRG, "PKT": PKT, "RKD": RKD, "SP": SP}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
SAME_GRID = {"student": FeatureSpec(tokens=(16, 6), grid=(4, 4)), "teacher": FeatureSpec(tokens=(16, 9), grid=(4, 4))}


def tapped(tensor: Tensor) -> Features:
    return Features(maps={"x": tensor})


@every_head
@pytest.mark.parametrize("of", ["embedding", "logits", "tokens", "last"])
def test_any_features_can_be_related(make: Any, of: str) -> None:
    check_head(partial(make, of=of))


@every_head
def test_tokens_of_an_image_can_be_related(make: Any, pool: RankPool) -> None:
    check_head(partial(make, of="tokens", scope="image"), **SAME_GRID, run=pool.run)


@every_head
def test_at_scope_image_it_is_the_mean_over_the_images(make: Any) -> None:
    student, teacher = Q([3, 6, 5], 3), Q([3, 6, 7], 4)
    each = [make(of="x")(tapped(s), tapped(t), {}) for s, t in zip(student, teacher, strict=True)]
    loss = make(of="x", scope="image")(tapped(student), tapped(teacher), {})
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-10, atol=0)


@every_head
def test_a_map_and_its_cells_as_tokens_are_one_vector_an_image(make: Any) -> None:
    student, teacher = Q([4, 3, 2, 2], 3), Q([4, 5, 4, 3], 4)
    as_map = make(of="x", scope="batch")(tapped(student), tapped(teacher), {})
    as_tokens = make(of="x")(*(tapped(side.flatten(2).mT) for side in (student, teacher)), {})
    torch.testing.assert_close(as_tokens, as_map, rtol=1e-10, atol=0)


@every_head
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(1, 10_000), scale=st.floats(0.1, 10))
def test_scale_and_rotation_of_a_network_change_nothing(make: Any, seed: int, scale: float) -> None:
    student, teacher = Q([6, 5], seed), Q([6, 7], seed + 1)
    moved = scale * (student @ torch.linalg.qr(Q([5, 5], seed + 2)).Q)
    head = make(of="x")
    torch.testing.assert_close(
        head(tapped(moved), tapped(teacher), {}), head(tapped(student), tapped(teacher), {}), rtol=1e-4, atol=1e-7
    )


@every_head
def test_a_student_like_its_teacher_up_to_scale_has_no_loss_and_no_gradient(make: Any) -> None:
    student = Q([6, 5], 3).requires_grad_()
    loss = make(of="x")(tapped(student), tapped(3 * student.detach()), {})
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max().item() < 1e-5


@every_head
@pytest.mark.parametrize(("student", "teacher"), [((16, 6), (36, 9)), ((6,), (9,)), ((6, 4, 4), (6, 4, 4))])
def test_scope_image_needs_equally_many_tokens(make: Any, student: Any, teacher: Any) -> None:
    head: FeatureRelation = make(of="x", scope="image")
    with pytest.raises(UserError, match=rf"{make.__name__} at scope 'image' needs equally many tokens"):
        head.build(FeatureSpec(maps={"x": student}), FeatureSpec(maps={"x": teacher}))


@every_head
def test_what_it_relates_is_what_it_needs(make: Any) -> None:
    spec = FeatureSpec(maps={"layer4": (3,)})
    with pytest.raises(UserError, match=rf"{make.__name__} needs 'layr4' of the student, .* 'layer4'"):
        make(of="layr4").check(spec, spec)
