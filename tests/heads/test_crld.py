from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from distill.errors import UserError
from distill.features import Features
from distill.heads import CRLD, RunInfo
from distill.heads.kd import KD
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs

VIEW = torch.arange(16) // 8
ARGUMENTS = {"wv": "within_weight", "cv": "across_weight", "T": "temperature"} | {
    "tau_w": "weak_threshold",
    "tau_s": "strong_threshold",
}


@pytest.mark.parametrize("name", ["crld_defaults", "crld_mixed"])
def test_value_parts_and_gradient_are_the_golden_ones(name: str) -> None:
    case, params = inputs(name), CASES[name]["params"]
    head = CRLD(**{ARGUMENTS[key]: value for key, value in params.items()})
    student, teacher = torch.cat([case["s"], case["s2"]]), torch.cat([case["t"], case["t2"]])
    assert_case(name, head(Features(student), Features(teacher), {"view": VIEW}), case.__getitem__)
    weights = {"within": params["wv"], "across": params["cv"]}
    parts = {key: weight * head.diagnostics()[key].item() for key, weight in weights.items()}
    assert parts == pytest.approx(CASES[name]["parts"], rel=1e-10)


def test_the_defaults_are_those_of_the_public_code() -> None:
    case = inputs("crld_defaults")
    student, teacher = torch.cat([case["s"], case["s2"]]), torch.cat([case["t"], case["t2"]])
    assert_case("crld_defaults", CRLD()(Features(student), Features(teacher), {"view": VIEW}), case.__getitem__)


def test_without_thresholds_it_is_kd_of_all_four_pairs_of_views() -> None:
    student, teacher = 2 * Q([16, 5], 1), 3 * Q([16, 5], 2)

    def mean(first: Any, second: Any) -> Any:
        return 16 * kl_div((first / 4).log_softmax(1), (second / 4).softmax(1), reduction="batchmean")

    (s, s2), (t, t2) = student.chunk(2), teacher.chunk(2)
    expected = 3 * (mean(s, t) + mean(s2, t2)) + 5 * (mean(s2, t) + mean(s, t2))
    head = CRLD(3.0, 5.0, weak_threshold=0.0, strong_threshold=0.0)
    assert head(Features(student), Features(teacher), {"view": VIEW}).item() == pytest.approx(expected.item())
    within = CRLD(1.0, 0.0, weak_threshold=0.0)(Features(student), Features(teacher), {"view": VIEW})
    assert within.item() == pytest.approx(2 * KD()(Features(student), Features(teacher), {}).item())


def test_thresholds_see_the_teachers_own_confidence_though_logits_are_standardized() -> None:
    student, teacher = 2 * Q([16, 5], 1), 30 * Q([16, 5], 2)
    gates = [(part.softmax(1).amax(1) >= 0.9).double() for part in teacher.chunk(2)]
    assert 0 < gates[0].mean() < 1
    head = CRLD(1.0, 0.0, standardize=True)
    loss = head(Features(student.requires_grad_()), Features(teacher), {"view": VIEW})
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient[:8].abs().sum(1) > 0, gates[0] > 0)
    assert torch.equal(gradient[8:].abs().sum(1) > 0, gates[0] > 0), "the weak view's confidence gates both"


@pytest.mark.parametrize(("views", "given"), [(1, "one"), (3, "3")])
def test_other_than_two_views_are_refused_before_the_first_step(views: int, given: str) -> None:
    with pytest.raises(UserError, match=f"CRLD compares two views of each image, given {given}: give two in data"):
        CRLD().prepare(RunInfo(views=views))
    CRLD().prepare(RunInfo(views=2))
    CRLD().prepare(RunInfo())


def test_thresholds_that_are_no_probability_are_refused() -> None:
    with pytest.raises(UserError, match="weak_threshold must be"):
        CRLD(weak_threshold=1.5)
