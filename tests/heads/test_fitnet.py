from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.fitnet import FitNet
from distill.testing import check_head
from tests.golden import Q, assert_relative
from tests.two_ranks import RankPool


def test_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = Q([8, 6], 3).requires_grad_(), Features(embedding=Q([8, 6], 5))
    head = FitNet("embedding", regressor="identity")
    head.build(FeatureSpec.of(teacher), FeatureSpec.of(teacher))
    assert_relative("fitnet", head(Features(embedding=student), teacher, {}), student)


@pytest.mark.parametrize(("of", "regressor"), [("tokens", "linear"), (("low", "high"), "linear")])
def test_a_linear_regressor_keeps_the_contract(of: Any, regressor: Any, pool: RankPool) -> None:
    check_head(partial(FitNet, of=of, regressor=regressor), run=pool.run)


def test_linear_is_the_mean_squared_error_of_a_map_of_each_pooled_cell() -> None:
    student, teacher = Features(maps={"layer": Q([2, 3, 6, 6], 1)}), Features(maps={"layer": Q([2, 5, 3, 2], 2)})
    head = FitNet("layer", regressor="linear").double()
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.double()
    regressor = head.regressors[0]
    cells = adaptive_avg_pool2d(student["layer"], (3, 2)).permute(0, 2, 3, 1)
    predicted = cells @ regressor.weight.flatten(1).T + regressor.bias  # type: ignore[operator,union-attr]
    expected = (predicted - teacher["layer"].permute(0, 2, 3, 1)).square().mean()
    torch.testing.assert_close(head(student, teacher, {}), expected)


def test_a_regressor_with_batch_norm_does_not_see_the_scale_of_the_student() -> None:
    student, teacher = Features(maps={"layer": Q([4, 3, 4, 4], 1)}), Features(maps={"layer": Q([4, 5, 4, 4], 2)})
    head = FitNet("layer")
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.double()
    scaled = student.apply(lambda tensor: 1000 * tensor)
    torch.testing.assert_close(head(scaled, teacher, {}), head(student, teacher, {}), rtol=1e-3, atol=0)


def test_identity_between_different_channels_is_refused() -> None:
    student, teacher = FeatureSpec(maps={"layer": (5, 4, 4)}), FeatureSpec(maps={"layer": (7, 4, 4)})
    with pytest.raises(UserError, match="'layer' has 5 channels in the student and 7 in the teacher: take 'linear'"):
        FitNet("layer", regressor="identity").build(student, teacher)


def test_an_unknown_regressor_is_refused() -> None:
    with pytest.raises(UserError, match="regressor cannot be 'linea': did you mean 'linear'"):
        FitNet(regressor="linea")  # type: ignore[arg-type]
