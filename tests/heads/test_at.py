from __future__ import annotations

from torch import Tensor

from distill.features import Features, FeatureSpec
from distill.heads.at import AT
from tests.golden import Q, assert_relative


def test_value_and_gradient_are_the_golden_ones() -> None:
    def seen(cells: Tensor) -> Features:
        return Features(maps={"layer": cells})

    student, teacher = Q([4, 5, 8, 8], 6).requires_grad_(), seen(Q([4, 7, 8, 8], 8))
    head = AT("layer")
    head.build(FeatureSpec.of(seen(student)), FeatureSpec.of(teacher))
    assert_relative("at", head(seen(student), teacher, {}), student)
    assert not list(head.parameters())
