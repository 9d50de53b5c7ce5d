from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.srrl import SRRL
from distill.testing import check_head
from tests.new_methods import CASES, assert_case, inputs
from tests.two_ranks import RankPool


def networks(x: dict[str, Tensor], of: str) -> tuple[Features, Features]:
    def network(cells: Tensor) -> Features:
        return Features(embedding=cells) if of == "embedding" else Features(maps={of: cells})

    classify = partial(F.linear, weight=x["Wt"], bias=x["bt"])
    embedding = x["g"] if of == "embedding" else x["g"].mean((2, 3))
    teacher = network(x["g"])
    return network(x["f"]), Features(classify(embedding), embedding, maps=teacher.maps, classify=classify)


@pytest.mark.parametrize(("name", "of"), [("srrl", "last"), ("srrl_pooled", "embedding")])
def test_value_and_gradient_are_the_golden_ones(name: str, of: str) -> None:
    x, parts = inputs(name), CASES[name]["parts"]
    student, teacher = networks(x, of)
    head = SRRL(of)
    for method in (head.check, head.build):
        method(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.double()
    convolution, norm = head.project
    tensors = {"f": x["f"], "w": convolution.weight, "gain": norm.weight, "shift": norm.bias}
    with torch.no_grad():
        for key in ("w", "gain", "shift"):
            tensors[key].copy_(x[key].view_as(tensors[key]))  # type: ignore[operator,arg-type]
    assert_case(name, head(student, teacher, {}), tensors.__getitem__)  # type: ignore[arg-type]
    for key, (alpha, beta) in {"feature": (1.0, 0.0), "logits": (0.0, 1.0)}.items():
        head.alpha, head.beta = alpha, beta
        assert head(student, teacher, {}).item() == pytest.approx(parts[key], rel=1e-10)


def test_value_is_that_of_the_literal_formula() -> None:
    x = inputs("srrl")
    student, teacher = networks(x, "last")
    head = SRRL("last", alpha=2.0, beta=3.0, relu=False)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    head.double()
    h = torch.einsum("dc,bchw->bdhw", head.project[0].weight.flatten(1), x["f"])  # type: ignore[operator,union-attr]
    h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    pooled, target = h.flatten(2).mean(2), x["g"].flatten(2).mean(2)
    logits = [vectors @ x["Wt"].T + x["bt"] for vectors in (pooled, target)]
    expected = 2 * (pooled - target).square().mean() + 3 * (logits[0] - logits[1]).square().mean()
    torch.testing.assert_close(head(student, teacher, {}), expected)


@pytest.mark.parametrize("relu", [True, False])
def test_the_pooled_form_keeps_the_contract(relu: bool, pool: RankPool) -> None:
    check_head(partial(SRRL, of="embedding", relu=relu), run=pool.run)


def test_the_projection_begins_with_hes_normal_distribution_by_fan_out() -> None:
    torch.manual_seed(0)
    head = SRRL("embedding")
    head.build(FeatureSpec(embedding=(300,)), FeatureSpec(embedding=(200,)))
    assert head.project[0].weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)  # type: ignore[union-attr,operator]


def test_only_the_teacher_needs_a_classifier() -> None:
    bare, classifying = FeatureSpec(tokens=(16, 6), grid=(4, 4)), FeatureSpec((5,), (9,), (36, 9), (6, 6), {}, True)
    SRRL().check(bare, classifying)
    with pytest.raises(UserError, match="SRRL calls the teacher's classifier, but this teacher has none"):
        SRRL().check(classifying, FeatureSpec((5,), (9,), (36, 9), (6, 6)))
    with pytest.raises(UserError, match="9 channels in the teacher, whose classifier takes 12"):
        SRRL().build(bare, FeatureSpec((5,), (12,), (36, 9), (6, 6), {}, True))
