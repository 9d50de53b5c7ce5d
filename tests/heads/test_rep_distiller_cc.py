from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import adjacent_congruence
from distill.heads.rep_distiller_cc import RepDistillerCC
from distill.testing import check_head
from tests.golden import Q, assert_relative
from tests.two_ranks import RankPool


def built(student: Features, teacher: Features, width: int = 4) -> RepDistillerCC:
    head = RepDistillerCC(width=width)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


def test_value_and_gradient_are_the_golden_ones_without_projections() -> None:
    student, teacher = Q([8, 6], 3).requires_grad_(), Q([8, 6], 5)
    seen = Features(embedding=student), Features(embedding=teacher)
    head = built(*seen)
    head.student_projection = head.teacher_projection = nn.Identity()
    assert_relative("cc", head(*seen, {}), student)


def test_both_networks_are_projected_to_one_width() -> None:
    seen = Features(embedding=Q([8, 6], 3)), Features(embedding=Q([8, 12], 4))
    head = built(*seen)
    assert {name: tuple(parameter.shape) for name, parameter in head.named_parameters()} == {
        "student_projection.weight": (4, 6),
        "student_projection.bias": (4,),
        "teacher_projection.weight": (4, 12),
        "teacher_projection.bias": (4,),
    }
    own, other = (
        side["embedding"] @ projection.weight.T + projection.bias  # type: ignore[operator]
        for side, projection in zip(seen, (head.student_projection, head.teacher_projection), strict=True)
    )
    torch.testing.assert_close(head(*seen, {}), adjacent_congruence(own, other))


@pytest.mark.parametrize("of", ["tokens", "last"])
def test_other_features_are_flattened(of: str, pool: RankPool) -> None:
    check_head(partial(RepDistillerCC, of=of, width=5), run=pool.run, ordered=True)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="width must be at least 1, given 0"):
        RepDistillerCC(width=0)
