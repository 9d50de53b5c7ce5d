from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.functional import class_activation_difference, region_means, region_weights
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs


@pytest.mark.parametrize("name", ["cat_kd", "cat_kd_normalised"])
def test_value_and_gradient_of_class_activations_are_the_golden_ones(name: str) -> None:
    x, params = inputs(name), CASES[name]["params"]
    normalize = params.get("normalise", False)
    loss = class_activation_difference(x["f"], x["g"], params["resolution"], normalize)
    assert_case(name, loss, x.__getitem__, scale=params["weight"])
    maps = [F.adaptive_avg_pool2d(x[key], params["resolution"]).flatten(2) for key in ("f", "g")]
    if normalize:
        maps = [each / each.square().sum(2, keepdim=True).sqrt() for each in maps]
    torch.testing.assert_close(loss, (maps[0] - maps[1]).square().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 2)])
def test_regions_are_pooled_from_the_finest_grid_row_by_row(size: tuple[int, int]) -> None:
    x = Q([2, 3, *size], 1)
    found = region_means(x, [1, 2, 4])
    finest = F.adaptive_avg_pool2d(x, 4)
    assert found.shape == (2, 21, 3)
    torch.testing.assert_close(found[:, 0], finest.mean((2, 3)))
    torch.testing.assert_close(found[:, 1], finest[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(found[:, 2], finest[..., :2, 2:].mean((2, 3)))
    torch.testing.assert_close(found[:, 5 + 4 + 3], finest[..., 1, 3])


def test_regions_where_the_teacher_changes_its_mind_about_the_target_weigh_more() -> None:
    image, right, wrong = [0.0, 2.0, 1.0], [0.0, 9.0, 1.0], [5.0, 0.0, 1.0]
    logits = torch.tensor([[image, right, wrong], [image, right, wrong], [wrong, right, wrong]])
    weights = region_weights(logits, torch.tensor([1, 0, 1]), complementary=3.0)
    assert weights.tolist() == [[1, 1, 3], [1, 1, 3], [1, 3, 1]]
