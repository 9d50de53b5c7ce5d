from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import RunInfo
from distill.heads.cross_entropy import CrossEntropy
from distill.heads.logit_adjustment import LogitAdjustment
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool

COUNTS = torch.tensor([100, 40, 9, 2, 1])
LABEL = torch.tensor([3, 0, -1, 1, -1, 4])
SOFT = torch.tensor([[0.25, 0, 0.75, 0, 0], [0] * 5, [0, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0.2] * 5])
SPEC = FeatureSpec(logits=(5,))


def prepared(temperature: float = 1.0, **kwargs: float) -> LogitAdjustment:
    head = LogitAdjustment(temperature, **kwargs)
    head.build(SPEC, SPEC)
    head.prepare(RunInfo(class_counts=lambda: COUNTS))
    return head


class Prepared(LogitAdjustment):
    """Knows counts from the start, for the contract.

    Args:
        temperature: tau.
    """

    def __init__(self, temperature: float = 1.5) -> None:
        super().__init__(temperature)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        super().build(student, teacher)
        self.prepare(RunInfo(class_counts=lambda: COUNTS))


def literal(x: Tensor, label: Tensor, temperature: float) -> float:
    """- log of n_y^tau e^z_y / sum_c n_c^tau e^z_c, mean over the labeled samples, in plain numbers."""
    total, labeled = 0.0, 0
    for row, own in zip(x.tolist(), label.tolist(), strict=True):
        if own >= 0:
            terms = [count**temperature * math.exp(z) for count, z in zip(COUNTS.tolist(), row, strict=True)]
            total, labeled = total - math.log(terms[own] / sum(terms)), labeled + 1
    return total / labeled


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_value_is_that_of_the_literal_formula(temperature: float) -> None:
    x = 2 * Q([6, 5], 1)
    loss = prepared(temperature)(Features(x), None, {"label": LABEL})
    assert loss.item() == pytest.approx(literal(x, LABEL, temperature), rel=1e-6)


def test_it_is_cross_entropy_of_adjusted_logits_for_soft_labels_and_smoothing_too() -> None:
    x = 2 * Q([6, 5], 1)
    adjusted = x + 1.5 * (COUNTS.double() / 152).log()
    for smoothing in (0.0, 0.1):
        for label in (LABEL, SOFT):
            expected = CrossEntropy(smoothing)(Features(adjusted), None, {"label": label})
            loss = prepared(1.5, label_smoothing=smoothing)(Features(x), None, {"label": label})
            torch.testing.assert_close(loss, expected)


def test_with_classes_of_one_size_it_is_cross_entropy() -> None:
    x, label = 2 * Q([6, 5], 1), LABEL.clamp_min(0)
    head = LogitAdjustment()
    head.build(SPEC, SPEC)
    torch.testing.assert_close(head(Features(x), None, {"label": label}), cross_entropy(x, label))


def test_a_rare_class_that_is_not_yet_chosen_weighs_more() -> None:
    x = torch.zeros(1, 5, requires_grad=True)
    gradients = []
    for label in (0, 4):
        loss = prepared()(Features(x), None, {"label": torch.tensor([label])})
        gradients.append(torch.autograd.grad(loss, x)[0][0, label].item())
    assert gradients == pytest.approx([100 / 152 - 1, 1 / 152 - 1])


def test_it_keeps_the_contract_with_unequal_classes(pool: RankPool) -> None:
    check_head(Prepared, run=pool.run)


def test_counts_are_kept_in_checkpoints_and_are_whole_numbers_in_any_precision() -> None:
    head = prepared().half()
    assert head.state_dict()["counts"].tolist() == COUNTS.tolist()
    assert head.counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([1, 2, 3], "LogitAdjustment was built for 5 classes, but the data have 3"),
        ([4, 4, 0, 4, 4], "LogitAdjustment needs a labeled training image of every class, class 2 has none"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: list[int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        prepared().prepare(RunInfo(class_counts=lambda: torch.tensor(counts)))


def test_arguments_outside_their_range_are_refused() -> None:
    with pytest.raises(UserError, match="temperature must be at least 0, given -1"):
        LogitAdjustment(-1)
    with pytest.raises(UserError, match="label_smoothing must be at least 0 and below 1, given 1"):
        LogitAdjustment(label_smoothing=1)
