from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import dkd
from distill.heads.dkd import DKD
from distill.heads.nkd import NKD
from distill.heads.rld import RLD
from distill.objective import Objective, Term
from distill.schedules import Progress, Warmup
from tests.golden import Q, assert_relative
from tests.new_methods import CASES, assert_case, inputs

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


@pytest.mark.parametrize("kind", [DKD, NKD, RLD])
def test_one_class_alone_is_refused(kind: type[DKD | NKD | RLD]) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} sets a class against the others, but .* 1 class"):
        kind().build(FeatureSpec(logits=(1,)), FeatureSpec(logits=(1,)))


@pytest.mark.parametrize("name", ["dkd_plain", "lskd_dkd"])
def test_standardized_logits_have_the_golden_figures(name: str) -> None:
    case, params = inputs(name), CASES[name]["params"]
    head = DKD(params["alpha"], params["beta"], params["T"], standardize=params["standardise"])
    loss = head(Features(case["s"]), Features(case["t"]), {"label": case["y"]})
    assert_case(name, loss, case.__getitem__)


def test_the_warmed_up_term_has_the_golden_figures_of_its_epoch() -> None:
    case, params = inputs("lskd_dkd_warmup"), CASES["lskd_dkd_warmup"]["params"]
    head = DKD(params["alpha"], params["beta"], params["T"], standardize=True)
    classes = FeatureSpec(logits=(10,))
    objective = Objective({"dkd": Term(head, Warmup(epochs=params["warmup"]))}, classes, classes)
    losses = objective(
        Features(case["s"]), Features(case["t"]), {"label": case["y"]}, Progress(epoch=float(params["epoch"]))
    )
    assert_case("lskd_dkd_warmup", losses.total, case.__getitem__)


def test_without_standardization_the_loss_is_the_plain_function_bit_for_bit() -> None:
    student, teacher = networks()
    found = DKD()(student, teacher, {"label": LABEL})
    expected = dkd(student["logits"], teacher["logits"], LABEL).sum() / 8
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss, student["logits"])[0] for loss in (found, expected)]
    assert torch.equal(*gradients)
