from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.functional import angle_cosines, angle_difference, angles, edges, huber
from tests.golden import Q


def literal(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition, by way of all cosines, whose gradient is autograd's."""
    return huber(angle_cosines(student), angle_cosines(teacher))


def gradient_of(loss: Tensor, tokens: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, tokens)
    return found


@pytest.mark.parametrize("at_a_time", [1, 50, 10_000])
@pytest.mark.parametrize("shape", [[7], [1], [3, 6], [2, 2, 5], [5, 3]])
def test_value_and_gradient_are_those_of_all_cosines(shape: list[int], at_a_time: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(angles.COSINES_PER_CHUNK, "cpu", at_a_time)
    student, teacher = 3 * Q([*shape, 4], 3).requires_grad_(), Q([*shape, 6], 4)
    loss, expected = angle_difference(edges(student), edges(teacher)), literal(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student), rtol=1e-9, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(1, 10_000), equal=st.integers(0, 5))
def test_equal_tokens_have_no_angle_and_no_gradient_that_is_not_finite(seed: int, equal: int) -> None:
    student = Q([6, 3], seed)
    student[:equal] = student[0]
    student.requires_grad_()
    teacher = Q([6, 5], seed + 1)
    loss, expected = angle_difference(edges(student), edges(teacher)), literal(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("at_a_time", [1, 100, 10_000])
def test_absent_tokens_are_left_out_of_their_sets_mean(at_a_time: int, monkeypatch: Any) -> None:
    monkeypatch.setitem(angles.COSINES_PER_CHUNK, "cpu", at_a_time)
    student, teacher = Q([4, 6, 4], 3).requires_grad_(), Q([4, 6, 5], 4)
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    loss = angle_difference(edges(student, present), edges(teacher, present), present)
    sets = [literal(own[here], other[here]) for own, other, here in zip(student, teacher, present, strict=True)]
    expected = torch.stack(sets[:3]).sum() / 4  # a set without tokens adds nothing
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student), rtol=1e-10, atol=1e-13)


def test_opposite_angles_are_compared_on_the_linear_part_of_the_loss() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]], dtype=torch.float64)
    assert (angle_cosines(student) - angle_cosines(teacher)).abs().max() > 1.5
    loss, expected = angle_difference(edges(student), edges(teacher)), literal(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student), rtol=1e-9, atol=1e-12)


def test_gradients_are_the_derivatives() -> None:
    teacher = edges(Q([5, 6], 4))
    assert torch.autograd.gradcheck(lambda x: angle_difference(edges(x), teacher), Q([5, 4], 3).requires_grad_())


def test_float32_is_near_float64() -> None:
    student, teacher = Q([40, 16], 3), Q([40, 24], 4)
    exact = student.clone().requires_grad_()
    rounded = student.float().requires_grad_()
    loss = angle_difference(edges(exact), edges(teacher))
    near = angle_difference(edges(rounded), edges(teacher.float()))
    assert near.item() == pytest.approx(loss.item(), rel=1e-5)
    apart = gradient_of(near, rounded).double() - gradient_of(loss, exact)
    assert apart.norm() < 1e-4 * gradient_of(angle_difference(edges(exact), edges(teacher)), exact).norm()


def test_no_tensor_of_all_triples_is_held() -> None:
    tokens = 160
    student, teacher = torch.randn(tokens, 8).requires_grad_(), torch.randn(tokens, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        angle_difference(edges(student), edges(teacher)).backward()
    assert measured.profiler is not None
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    assert 0 < held.max().item() < 4 * tokens**3 / 2
