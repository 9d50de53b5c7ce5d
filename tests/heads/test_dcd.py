from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.dcd import DCD
from tests.golden import Q


def built(**arguments: float) -> DCD:
    head = DCD(width=4, **arguments)
    head.build(FeatureSpec(embedding=(6,)), FeatureSpec(embedding=(12,)))
    return head.double()


def call(head: DCD) -> Tensor:
    return head(Features(embedding=Q([8, 6], 3)), Features(embedding=Q([8, 12], 4)), {})


def literal(head: DCD, scale: float, bias: float = 0.0) -> float:
    """The loss, image by image."""
    s, t = (
        F.normalize(x @ p.weight.T + p.bias, dim=1)
        for x, p in ((Q([8, 6], 3), head.student_projection), (Q([8, 12], 4), head.teacher_projection))
    )
    total = 0.0
    for i in range(8):
        of_student = (torch.stack([s[i] @ t[j] for j in range(8)]) * scale + bias).softmax(0)
        of_teacher = (torch.stack([s[j] @ t[i] for j in range(8)]) * scale + bias).softmax(0)
        divergence = (of_teacher * (of_teacher / of_student).log()).sum()
        total += (-of_student[i].log() + head.consistency * divergence).item()
    return total / 8


@pytest.mark.parametrize("consistency", [0.0, 0.5, 2.0])
def test_value_is_that_of_the_literal_formula(consistency: float) -> None:
    head = built(consistency=consistency)
    assert call(head).item() == pytest.approx(literal(head, math.e), rel=1e-10)
    assert head.diagnostics()["scale"].item() == pytest.approx(math.e, rel=1e-6)


def test_a_bias_on_all_logits_would_change_nothing() -> None:
    head = built()
    assert literal(head, math.e, bias=3.0) == pytest.approx(literal(head, math.e), rel=1e-10)


def test_scale_ends_at_its_limit() -> None:
    head = built()
    with torch.no_grad():
        head.log_scale.fill_(5.0)
    assert call(head).item() == pytest.approx(literal(head, 10.0), rel=1e-10)


def test_at_scale_zero_it_is_the_log_of_the_batch_size() -> None:
    assert call(built(log_scale=-40.0)).item() == pytest.approx(math.log(8), rel=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_scale": 0.0}, "max_scale must be above 0"), ({"log_scale": 3.0}, "log_scale must be below .* given 3")],
)
def test_an_argument_out_of_its_range_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DCD(**arguments)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="width must be at least 1, given 0"):
        DCD(width=0)


def test_a_checkpoint_of_another_width_is_refused() -> None:
    head = DCD(width=5)
    head.build(FeatureSpec(embedding=(6,)), FeatureSpec(embedding=(12,)))
    with pytest.raises(UserError, match="DCD: the teacher's projection .* is 4 x 12 in the checkpoint and 5 x 12 in"):
        head.load_state_dict(built().state_dict())
