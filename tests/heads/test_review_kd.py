from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import hierarchical_context_loss
from distill.heads.review_kd import Fusion, ReviewKD
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool

STUDENT = Features(maps={"low": Q([3, 4, 8, 8], 1), "mid": Q([3, 5, 4, 4], 2), "high": Q([3, 6, 2, 2], 3)})
TEACHER = Features(maps={"low": Q([3, 7, 6, 6], 4), "mid": Q([3, 8, 4, 4], 5), "high": Q([3, 9, 3, 3], 6)})


def built(*of: str, width: int = 512) -> ReviewKD:
    head = ReviewKD(of, width)
    torch.manual_seed(0)
    head.build(FeatureSpec.of(STUDENT), FeatureSpec.of(TEACHER))
    return head.double()


def normalized(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_three_layers_keep_the_contract(pool: RankPool) -> None:
    check_head(partial(ReviewKD, of=("low", "mid", "embedding"), width=3), run=pool.run)


def test_it_reviews_from_deep_to_shallow() -> None:
    head = built("low", "mid", "high", width=3)
    low, mid, high = head.fusions
    deep = F.interpolate(normalized(F.conv2d(STUDENT["high"], high.reduce[0].weight)), (3, 3))
    expected = hierarchical_context_loss(normalized(F.conv2d(deep, high.expand[0].weight, padding=1)), TEACHER["high"])
    for fusion, name in ((mid, "mid"), (low, "low")):
        own = normalized(F.conv2d(STUDENT[name], fusion.reduce[0].weight))
        deep = F.interpolate(deep, own.shape[2:])
        share = F.conv2d(torch.cat([own, deep], 1), fusion.attention.weight, fusion.attention.bias).sigmoid()
        mixed = torch.stack([own, deep]) * share.transpose(0, 1).unsqueeze(2)
        deep = F.interpolate(mixed.sum(0), TEACHER[name].shape[2:])
        expected = expected + hierarchical_context_loss(
            normalized(F.conv2d(deep, fusion.expand[0].weight, padding=1)), TEACHER[name]
        )
    torch.testing.assert_close(head(STUDENT, TEACHER, {}), expected)


def test_a_deep_layer_of_the_student_learns_from_all_shallower_layers_of_the_teacher() -> None:
    head = built("low", "mid", "high")
    for name, learns in (("low", ["low", "mid", "high"]), ("mid", ["mid", "high"]), ("high", ["high"])):
        student = STUDENT.apply(lambda tensor: tensor.clone().requires_grad_())
        results, deeper = {}, None
        for layer, fusion in reversed(list(zip(head.of, head.fusions, strict=True))):
            results[layer], deeper = fusion(student[layer], deeper, TEACHER[layer].shape[2:])
        inputs = [student[layer] for layer in head.of]
        found = torch.autograd.grad(results[name].square().sum(), inputs, allow_unused=True)
        assert [layer for layer, gradient in zip(head.of, found, strict=True) if gradient is not None] == learns


def test_fusion_takes_each_cell_from_either_by_its_own_share() -> None:
    fusion = Fusion(4, 3, 5, deepest=False).double()
    with torch.no_grad():
        fusion.attention.weight.zero_()  # type: ignore[union-attr,operator]
        fusion.attention.bias.copy_(torch.tensor([-50.0, 50.0]))  # type: ignore[union-attr,operator]
    deeper = Q([2, 3, 4, 4], 2)
    _, fused = fusion(Q([2, 4, 4, 4], 1), deeper, (4, 4))
    torch.testing.assert_close(fused, deeper)


@pytest.mark.parametrize(("width", "taken"), [(3, 3), (512, 6)])
def test_it_fuses_in_the_width_of_the_deepest_layer_or_less(width: int, taken: int) -> None:
    assert [fusion.reduce[0].out_channels for fusion in built("low", "high", width=width).fusions] == [taken, taken]  # type: ignore[index,union-attr]


def test_a_width_below_1_is_refused() -> None:
    with pytest.raises(UserError, match="width must be at least 1, given 0"):
        ReviewKD(width=0)
