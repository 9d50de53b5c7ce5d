from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import nkd
from distill.heads.nkd import NKD
from distill.schedules import Linear, Progress
from tests.new_methods import CASES, assert_case, inputs


def networks() -> tuple[Features, Features, Tensor]:
    case = inputs("nkd_T1")
    return Features(case["s"]), Features(case["t"]), case["y"]


@pytest.mark.parametrize("name", ["nkd_T1", "nkd_T3"])
def test_value_and_gradient_are_the_golden_ones(name: str) -> None:
    case, params = inputs(name), CASES[name]["params"]
    loss = NKD(params["gamma"], params["T"])(Features(case["s"]), Features(case["t"]), {"label": case["y"]})
    assert_case(name, loss, case.__getitem__)


def test_mean_runs_over_the_labeled_samples() -> None:
    student, teacher, label = networks()
    kept = torch.arange(8) % 3 != 0
    expected = nkd(student["logits"][kept], teacher["logits"][kept], label[kept]).mean()
    found = NKD()(student, teacher, {"label": label.masked_fill(~kept, -1)})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_target_of_a_mixed_label_is_its_largest_class() -> None:
    student, teacher, label = networks()
    mixed = 0.7 * torch.eye(10)[label] + 0.3 * torch.eye(10)[(label + 1) % 10]
    assert torch.equal(NKD()(student, teacher, {"label": mixed}), NKD()(student, teacher, {"label": label}))


def test_an_equal_student_is_at_the_minimum() -> None:
    student, _, label = networks()
    loss = NKD()(student, student, {"label": label})
    (gradient,) = torch.autograd.grad(loss, student["logits"])
    others = gradient.scatter(1, label.unsqueeze(1), 0)
    assert loss.item() > 0
    assert not others.isclose(torch.zeros(()).double(), atol=1e-6).all()  # the target's part pulls at all logits
    pulled = -student["logits"].softmax(1).gather(1, label.unsqueeze(1)) / 8
    expected = pulled * (torch.eye(10)[label] - student["logits"].softmax(1))
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-12)


def test_temperature_can_follow_a_schedule_and_is_above_zero() -> None:
    student, teacher, label = networks()
    head = NKD(temperature=Linear(1.0, 3.0))
    head.progress = Progress(step=5, steps=10)
    batch = {"label": label}
    assert torch.equal(head(student, teacher, batch), NKD(temperature=2.0)(student, teacher, batch))
    with pytest.raises(UserError, match="temperature must be above 0, given 0"):
        NKD(temperature=0.0)


def test_different_class_counts_are_refused() -> None:
    with pytest.raises(UserError, match="NKD compares class by class"):
        NKD().build(FeatureSpec(logits=(5,)), FeatureSpec(logits=(6,)))
