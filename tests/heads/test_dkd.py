from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import dkd
from distill.heads.dkd import DKD
from tests.golden import Q, assert_relative

LABEL = (3 * torch.arange(8) + 1) % 10


def networks() -> tuple[Features, Features]:
    return Features((2 * Q([8, 10], 1)).requires_grad_()), Features(3 * Q([8, 10], 2))


def test_value_and_gradient_are_the_golden_ones() -> None:
    student, teacher = networks()
    assert_relative("dkd", DKD()(student, teacher, {"label": LABEL}), student["logits"])


def test_mean_runs_over_the_labeled_samples() -> None:
    student, teacher = networks()
    label = LABEL.clone()
    label[[0, 5]] = -1
    kept = label >= 0
    expected = dkd(student["logits"][kept], teacher["logits"][kept], label[kept]).mean()
    torch.testing.assert_close(DKD()(student, teacher, {"label": label}), expected)


@pytest.mark.parametrize("label", [torch.full((8,), -1), torch.zeros(8, 10)])
def test_without_any_label_loss_and_gradient_are_zero(label: Tensor) -> None:
    student, teacher = networks()
    loss = DKD()(student, teacher, {"label": label})
    (gradient,) = torch.autograd.grad(loss, student["logits"])
    assert loss.item() == 0.0
    assert not gradient.any()


def test_target_of_a_soft_label_is_its_largest_class() -> None:
    student, teacher = networks()
    soft = 0.7 * torch.eye(10)[LABEL] + 0.3 * torch.eye(10)[(LABEL + 1) % 10]
    soft[3] = 0
    label = LABEL.clone()
    label[3] = -1
    assert torch.equal(DKD()(student, teacher, {"label": soft}), DKD()(student, teacher, {"label": label}))


def test_a_label_beyond_the_classes_is_not_taken_for_unlabeled() -> None:
    student, teacher = networks()
    for wrong in (10, -2):
        with pytest.raises((IndexError, RuntimeError)):
            DKD()(student, teacher, {"label": LABEL.clone().fill_(wrong)})


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(UserError, match="1 class"):
        DKD().build(FeatureSpec(logits=(1,)), FeatureSpec(logits=(1,)))
