from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import effective_number_weights, label_margins
from distill.heads import RunInfo
from distill.heads.ldam import LDAM
from distill.schedules import Progress
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool

COUNTS = torch.tensor([100, 40, 9, 2, 1])
LABEL = torch.tensor([3, 0, -1, 1, -1, 4])
SOFT = torch.tensor([[0.25, 0, 0.75, 0, 0], [0] * 5, [0, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0.2] * 5])
SPEC = FeatureSpec(logits=(5,))
LATE = Progress(step=80, steps=100)


def prepared(progress: Progress = LATE, **kwargs: Any) -> LDAM:
    head = LDAM(**kwargs)
    head.build(SPEC, SPEC)
    head.progress = progress
    head.prepare(RunInfo(progress, class_counts=lambda: COUNTS))
    return head


class Prepared(LDAM):
    """Knows counts, and is late in a run, from the start, for the contract.

    Args:
        scale: s.
    """

    def __init__(self, scale: float = 3.0) -> None:
        super().__init__(scale=scale)
        self.progress = LATE

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        super().build(student, teacher)
        self.prepare(RunInfo(Progress(steps=10), class_counts=lambda: COUNTS))


def literal(x: Tensor, soft: Tensor, margin: float, scale: float, beta: float | None) -> float:
    """Row by row: margins by the fourth root, weights by the effective numbers, of a label's classes each its share."""
    counts = COUNTS.tolist()
    roots = [count**0.25 for count in counts]
    margins = [margin * min(roots) / root for root in roots]
    weights = [1.0] * 5 if beta is None else [(1 - beta) / (1 - beta**count) for count in counts]
    total, weight = 0.0, 0.0
    for row, label in zip(x.tolist(), soft.tolist(), strict=True):
        if sum(label) == 0:
            continue
        z = [scale * (row[c] - margins[c] * label[c] / sum(label)) for c in range(5)]
        log_sum = math.log(sum(math.exp(value) for value in z))
        for c in range(5):
            total += weights[c] * label[c] * (log_sum - z[c])
            weight += weights[c] * label[c]
    return total / weight


@pytest.mark.parametrize("beta", [None, 0.9999, 0.9])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value_is_that_of_the_literal_formula(scale: float, beta: float | None) -> None:
    x = 0.5 * Q([6, 5], 1)
    head = prepared(scale=scale, margin=0.4, **({"reweight_from": None} if beta is None else {"beta": beta}))
    hard = torch.zeros(6, 5)
    hard[LABEL >= 0, LABEL[LABEL >= 0]] = 1
    expected = literal(x, hard, 0.4, scale, beta)
    for label in (LABEL, hard):
        assert head(Features(x), None, {"label": label}).item() == pytest.approx(expected, rel=1e-6)
    soft = head(Features(x), None, {"label": SOFT}).item()
    assert soft == pytest.approx(literal(x, SOFT, 0.4, scale, beta), rel=1e-6)


def test_the_rarest_class_has_the_widest_margin() -> None:
    margins = label_margins(COUNTS.double(), 0.5)
    assert margins[-1] == 0.5
    assert margins[0].item() == pytest.approx(0.5 / 100**0.25)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9999, 1 - 1e-7])
def test_weights_of_effective_numbers_are_exact_also_in_float32(beta: float) -> None:
    counts = torch.tensor([1, 5, 1000, 1_000_000])
    exact = [(1 - beta) / (1 - beta**count) for count in counts.tolist()]
    expected = torch.tensor(exact) * 4 / sum(exact)
    torch.testing.assert_close(effective_number_weights(counts.float(), beta), expected, rtol=1e-5, atol=0)


def test_without_margin_scale_and_reweighting_it_is_cross_entropy() -> None:
    x, label = Q([6, 5], 1), LABEL.clamp_min(0)
    head = prepared(margin=0.0, scale=1.0, reweight_from=None)
    torch.testing.assert_close(head(Features(x), None, {"label": label}), cross_entropy(x, label))


def test_re_weighting_is_deferred_to_its_share_of_the_run() -> None:
    x = Q([6, 5], 1)
    never = prepared(reweight_from=None)(Features(x), None, {"label": LABEL})
    early, late = (prepared(Progress(step=step, steps=100))(Features(x), None, {"label": LABEL}) for step in (79, 80))
    assert early == never
    assert late != never


def test_a_weighted_sample_outweighs_in_the_gradient() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    loss = prepared(margin=0.0)(Features(x), None, {"label": torch.tensor([0, 4])})
    (gradient,) = torch.autograd.grad(loss, x)
    ratio = (1 - 0.9999**100) / (1 - 0.9999)
    assert (gradient[1, 4] / gradient[0, 0]).item() == pytest.approx(ratio, rel=1e-4)


def test_without_any_label_loss_and_gradient_are_zero() -> None:
    for label in (torch.full((6,), -1), torch.zeros(6, 5)):
        x = Q([6, 5], 1).requires_grad_()
        loss = prepared()(Features(x), None, {"label": label})
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, x)[0].any()


def test_it_keeps_the_contract_with_unequal_classes(pool: RankPool) -> None:
    check_head(Prepared, run=pool.run)


def test_a_run_without_an_end_has_no_share_to_wait_for() -> None:
    with pytest.raises(UserError, match=r"reweight_from is a share of the run, 0.8, but the run has no end"):
        prepared(Progress())
    prepared(Progress(), reweight_from=None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"margin": -0.1}, "margin must be at least 0, given -0.1"),
        ({"scale": 0.0}, "scale must be above 0, given 0.0"),
        ({"beta": 1.0}, "beta must be at least 0 and below 1, given 1.0"),
        ({"reweight_from": 1.2}, "reweight_from must be between 0 and 1, given 1.2"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LDAM(**arguments)
