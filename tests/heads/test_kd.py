from __future__ import annotations

import pytest
import torch

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import kd
from distill.heads.ctkd import CTKD
from distill.heads.dist import DIST
from distill.heads.dkd import DKD
from distill.heads.kd import KD
from distill.heads.mlkd import MLKD
from distill.schedules import Linear, Progress
from tests.golden import Q, assert_relative
from tests.new_methods import CASES, assert_case, inputs


def test_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = (2 * Q([8, 10], 1)).requires_grad_(), 3 * Q([8, 10], 2)
    assert_relative("kd", KD()(Features(student), Features(teacher), {}), student)


def test_temperature_can_be_a_schedule() -> None:
    student, teacher = Features(2 * Q([8, 10], 1)), Features(3 * Q([8, 10], 2))
    head = KD(Linear(8.0, 4.0))
    head.progress = Progress(step=100, steps=100)
    assert torch.equal(head(student, teacher, {}), KD(4.0)(student, teacher, {}))
    head.progress = Progress(step=0, steps=100)
    assert torch.equal(head(student, teacher, {}), KD(8.0)(student, teacher, {}))


@pytest.mark.parametrize("kind", [KD, DKD])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(kind: type[KD | DKD], temperature: float) -> None:
    with pytest.raises(UserError, match="temperature must be above 0, given"):
        kind(temperature=temperature)


@pytest.mark.parametrize("kind", [KD, DKD])
def test_different_class_counts_are_refused_and_both_named(kind: type[KD | DKD]) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} .* the student has 10 classes and the teacher 100"):
        kind().build(FeatureSpec(logits=(10,)), FeatureSpec(logits=(100,)))


@pytest.mark.parametrize("name", ["kd_plain", "lskd_kd", "lskd_kd_T3"])
def test_standardized_logits_have_the_golden_figures(name: str) -> None:
    case, params = inputs(name), CASES[name]["params"]
    head = KD(params["T"], standardize=params["standardise"])
    assert_case(name, head(Features(case["s"]), Features(case["t"]), {}), case.__getitem__, params["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_standardization_the_loss_is_the_plain_function_bit_for_bit(dtype: torch.dtype) -> None:
    student, teacher = Q([8, 10], 1).to(dtype).requires_grad_(), 3 * Q([8, 10], 2).to(dtype)
    found = KD(2.0)(Features(student), Features(teacher), {})
    expected = kd(student, teacher, 2.0).mean()
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("kind", [KD, DIST, CTKD, MLKD])
def test_one_class_cannot_be_standardized(kind: type[KD | DIST | MLKD]) -> None:
    one = FeatureSpec(logits=(1,))
    kind().build(one, one)
    with pytest.raises(UserError, match=f"{kind.__name__} cannot standardize the logits of 1 class"):
        kind(standardize=True).build(one, one)
