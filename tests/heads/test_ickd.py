from __future__ import annotations

from functools import partial

import pytest
import torch

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.ickd import ICKD
from distill.testing import STUDENT, TEACHER, check_head
from tests.new_methods import assert_case, inputs
from tests.two_ranks import RankPool


def test_value_and_gradient_are_the_golden_ones() -> None:
    x = inputs("ickd")
    student, teacher = Features(maps={"last": x["f"]}), Features(maps={"last": x["g"]})
    head = ICKD("last")
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.double()
    convolution, norm = head.projections[0]  # type: ignore[misc]
    tensors = {"f": x["f"], "w": convolution.weight, "gain": norm.weight, "shift": norm.bias}
    with torch.no_grad():
        for key in ("w", "gain", "shift"):
            tensors[key].copy_(x[key].view_as(tensors[key]))
    assert_case("ickd", head(student, teacher, {}), tensors.__getitem__)


def test_fewer_cells_than_channels_keep_the_contract(pool: RankPool) -> None:
    student, teacher = FeatureSpec(maps={"low": (6, 2, 2)}), FeatureSpec(maps={"low": (9, 2, 3)})
    check_head(partial(ICKD, "low"), student, teacher, run=pool.run)


def test_a_single_cell_is_refused() -> None:
    with pytest.raises(UserError, match="over the cells of a map, but 'embedding' has 1 cell in the student"):
        ICKD(["tokens", "embedding"]).build(STUDENT, TEACHER)
