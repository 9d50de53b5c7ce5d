from __future__ import annotations

import pytest
import torch

from distill.functional import huber, kl_divergence
from tests.golden import Q


def test_huber_is_half_the_square_within_delta_and_linear_beyond() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert huber(torch.tensor([0.5, -3.0, 0.0], dtype=torch.float64), zero).item() == pytest.approx((0.125 + 2.5) / 3)


def test_huber_can_take_its_mean_over_the_present_entries_alone() -> None:
    student, teacher = Q([2, 4, 4], 1), Q([2, 4, 4], 2)
    present = torch.tensor([[True, True, False, True], [True, False, False, True]])
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    expected = torch.nn.functional.huber_loss(student[pairs], teacher[pairs])
    torch.testing.assert_close(huber(student, teacher, pairs), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(huber(student, teacher, pairs[:1]), huber(student, teacher, pairs[:1].expand(2, 4, 4)))


def test_huber_over_nothing_is_zero() -> None:
    student = Q([3], 1).requires_grad_()
    loss = huber(student, torch.zeros_like(student), torch.zeros(3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_divergence_is_that_of_the_literal_formula(temperature: float) -> None:
    student, teacher = 2 * Q([3, 5], 1), 3 * Q([3, 5], 2)
    p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), expected, rtol=1e-10, atol=1e-14)


def test_kl_divergence_of_equal_distributions_is_zero() -> None:
    logits = Q([3, 5], 1)
    torch.testing.assert_close(
        kl_divergence(logits + 7, logits), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15
    )
