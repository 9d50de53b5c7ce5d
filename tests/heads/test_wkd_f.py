from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import gaussian_distance
from distill.heads.wkd_f import WKDF
from distill.testing import STUDENT, TEACHER, check_head
from tests.golden import Q
from tests.new_methods import assert_case, inputs
from tests.two_ranks import RankPool


def built(student: Features, teacher: Features, **arguments: object) -> WKDF:
    head = WKDF("last", **arguments)  # type: ignore[arg-type]
    torch.manual_seed(0)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head.double()


def test_value_and_gradient_are_the_golden_ones() -> None:
    """The convolution of the public code has a bias, which its batch normalization cancels."""
    x = inputs("wkd_f")
    student, teacher = Features(maps={"last": x["f"]}), Features(maps={"last": x["g"]})
    head = built(student, teacher)
    convolution, norm = head.regressors[0][0], head.regressors[0][1]  # type: ignore[index]
    tensors = {"f": x["f"], "w": convolution.weight, "gain": norm.weight, "shift": norm.bias}
    with torch.no_grad():
        for key in ("w", "gain", "shift"):
            tensors[key].copy_(x[key].view_as(tensors[key]))
    assert_case("wkd_f", head(student, teacher, {}), tensors.__getitem__)


@pytest.mark.parametrize(("size", "target"), [((8, 6), (4, 3)), ((2, 3), (4, 6)), ((5, 5), (4, 4))])
@pytest.mark.parametrize("relu", [True, False])
def test_a_grid_of_half_or_twice_the_cells_is_reached_by_a_convolution_as_in_the_public_code(
    size: tuple[int, int], target: tuple[int, int], relu: bool
) -> None:
    student, teacher = Features(maps={"last": Q([4, 3, *size], 1)}), Features(maps={"last": Q([4, 5, *target], 2)})
    head = built(student, teacher, grid=2, ratio=3.0, relu=relu)
    weight: Tensor = head.regressors[0][0].weight  # type: ignore[index,assignment]
    cells = student["last"]
    if size == (8, 6):
        cells = F.conv2d(cells, weight, stride=2, padding=1)
    elif size == (2, 3):
        cells = F.conv_transpose2d(cells, weight, stride=2, padding=1)
        assert weight.shape == (3, 5, 4, 4)
    else:
        cells = F.conv2d(cells, weight)
    assert cells.shape[2:] == (size if size == (5, 5) else target)
    cells = nn.BatchNorm2d(5).double()(cells)
    expected = gaussian_distance(cells.relu() if relu else cells, teacher["last"], grid=2, ratio=3.0)
    torch.testing.assert_close(head(student, teacher, {}), expected)


def test_two_layers_on_a_grid_keep_the_contract(pool: RankPool) -> None:
    student = FeatureSpec(maps={"low": (4, 8, 8), "high": (5, 4, 4)})
    teacher = FeatureSpec(grid=(4, 4), maps={"low": (7, 4, 4), "high": (17, 6)})
    check_head(partial(WKDF, of=("low", "high"), grid=2), student, teacher, run=pool.run)


def test_a_grid_that_leaves_one_pixel_in_a_cell_is_refused() -> None:
    with pytest.raises(UserError, match="grid 4 leaves 1 of the 4 x 4 of 'tokens' in the student: give a smaller"):
        WKDF(grid=4).build(STUDENT, TEACHER)
    with pytest.raises(UserError, match="grid 1 leaves 1 of the 1 x 1 of 'embedding' in the student"):
        WKDF("embedding").build(STUDENT, TEACHER)
    WKDF(grid=4).build(FeatureSpec(tokens=(16, 6), grid=(4, 4)), FeatureSpec(tokens=(64, 9), grid=(8, 8)))


@pytest.mark.parametrize(("arguments", "message"), [({"grid": 0}, "grid must be"), ({"ratio": 0.0}, "ratio must be")])
def test_numbers_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WKDF(**arguments)  # type: ignore[arg-type]
