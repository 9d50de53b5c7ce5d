from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import class_activation_difference
from distill.heads.cat_kd import CATKD
from distill.networks import Timm
from distill.testing import check_head
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs
from tests.two_ranks import RankPool


def network(cells: Tensor, weight: Tensor, bias: Tensor) -> Features:
    classify = partial(F.linear, weight=weight, bias=bias)
    embedding = cells.mean((2, 3))
    return Features(classify(embedding), embedding, maps={"last": cells}, classify=classify)


def built(student: Features, teacher: Features, resolution: int = 2, normalize: bool = False) -> CATKD:
    head = CATKD("last", resolution, normalize)
    for method in (head.check, head.build):
        method(FeatureSpec.of(student), FeatureSpec.of(teacher))
    return head


@pytest.mark.parametrize("name", ["cat_kd", "cat_kd_normalised"])
def test_with_the_maps_themselves_as_activation_value_and_gradient_are_the_golden_ones(name: str) -> None:
    x, params = inputs(name), CASES[name]["params"]
    unit, zero = torch.eye(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    student, teacher = network(x["f"], unit, zero), network(x["g"], unit, zero)
    head = built(student, teacher, params["resolution"], params.get("normalise", False))
    assert_case(name, head(student, teacher, {}), x.__getitem__, scale=params["weight"])


@pytest.mark.parametrize("normalize", [True, False])
def test_activation_is_the_classifier_as_a_convolution(normalize: bool) -> None:
    cells, target = Q([3, 5, 8, 8], 1).requires_grad_(), Q([3, 7, 5, 6], 2)
    weight, bias, own, shift = Q([10, 5], 3).requires_grad_(), Q([10], 4), Q([10, 7], 5), Q([10], 6)
    student, teacher = network(cells, weight, bias), network(target, own, shift)
    activations = [F.conv2d(cells, weight[..., None, None], bias), F.conv2d(target, own[..., None, None], shift)]
    expected = class_activation_difference(activations[0], activations[1], 3, normalize)
    loss = built(student, teacher, 3, normalize)(student, teacher, {})
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, (cells, weight)) for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_at_resolution_one_it_is_the_mean_squared_difference_of_the_logits_of_real_networks() -> None:
    torch.manual_seed(0)
    student, teacher = Timm("test_resnet"), Timm("test_efficientnet")
    for each in (student, teacher):
        each.build(10, (3, 64, 64))
    image = torch.rand(3, 3, 64, 64)
    seen, target = student(image), teacher.eval()(image)
    head = CATKD(resolution=1)
    head.check(student.spec, teacher.spec)
    head.build(student.spec, teacher.spec)
    expected = F.mse_loss(seen["logits"], target["logits"])
    torch.testing.assert_close(head(seen, target, {}), expected, rtol=1e-3, atol=1e-6)


def test_normalized_maps_keep_the_contract(pool: RankPool) -> None:
    check_head(partial(CATKD, resolution=4, normalize=True), run=pool.run)


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    five, six = (FeatureSpec((classes,), (6,), (16, 6), (4, 4), {}, True) for classes in (5, 6))
    with pytest.raises(
        UserError, match="CATKD compares class by class, but the student has 5 classes and the teacher 6"
    ):
        CATKD().build(five, six)
    with pytest.raises(UserError, match="CATKD calls the student's classifier, but this student has none"):
        CATKD().check(FeatureSpec((5,), (6,), (16, 6), (4, 4)), five)
    with pytest.raises(UserError, match="resolution must be at least 1, given 0"):
        CATKD(resolution=0)
