from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.functional.contrast import info_nce, memory_relation, noise_contrast, softmax_over_memory
from tests.golden import Q


def unit(shape: list[int], seed: int) -> Tensor:
    return F.normalize(Q(shape, seed), dim=-1)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 20, 100])
@pytest.mark.parametrize("filled", [None, 1, 6, torch.tensor(13), 20])
def test_softmax_over_memory_is_that_of_the_filled_rows(filled: Tensor | int | None, chunk: int | None) -> None:
    query, memory = 9 * Q([5, 4], 1), Q([20, 4], 2)
    kept = memory if filled is None else memory[: int(filled)]
    log_sum, mean = softmax_over_memory(query, memory, filled, chunk)
    torch.testing.assert_close(log_sum, (query @ kept.T).logsumexp(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, (query @ kept.T).softmax(1) @ kept, rtol=1e-12, atol=1e-12)


def test_softmax_over_memory_survives_logits_far_beyond_the_range_of_exponentials() -> None:
    query, memory = 1e4 * unit([5, 4], 1).float(), unit([20, 4], 2).float()
    log_sum, mean = softmax_over_memory(query, memory, chunk=3)
    torch.testing.assert_close(log_sum, (query @ memory.T).logsumexp(1))
    torch.testing.assert_close(mean, (query @ memory.T).softmax(1) @ memory)


@pytest.mark.parametrize("chunk", [None, 3])
def test_over_an_empty_memory_everything_is_zero(chunk: int | None) -> None:
    student = unit([5, 4], 1).requires_grad_()
    relation = memory_relation(student, unit([5, 4], 2), torch.zeros(20, 4), 0.1, 0.02, torch.tensor(0), chunk)
    (gradient,) = torch.autograd.grad(relation.cross_entropy.sum(), student)
    assert not any(part.any() for part in (*relation, gradient))


@pytest.mark.parametrize("chunk", [None, 3, 20])
def test_relation_is_that_of_the_literal_distributions(chunk: int | None) -> None:
    student, teacher, memory = unit([5, 4], 1).requires_grad_(), unit([5, 4], 2), unit([20, 4], 3)
    q = (memory @ student.T / 0.1).softmax(0).T
    p = (memory @ teacher.T / 0.02).softmax(0).T
    expected = -(p * q.log()).sum(1)
    relation = memory_relation(student, teacher, memory, 0.1, 0.02, chunk=chunk)
    torch.testing.assert_close(relation.cross_entropy, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(relation.teacher_entropy, -torch.xlogy(p, p).sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(relation.student_entropy, -torch.xlogy(q, q).sum(1).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss.sum(), student)[0] for loss in (relation.cross_entropy, expected)),
        rtol=1e-10,
        atol=1e-12,
    )


def test_relation_minus_the_teachers_entropy_is_never_negative_and_zero_for_equals() -> None:
    one, other, memory = unit([50, 4], 1), unit([50, 4], 2), unit([20, 4], 3)
    apart, equal = (memory_relation(one, teacher, memory, 0.05, 0.05) for teacher in (other, one))
    assert (apart.cross_entropy > apart.teacher_entropy).all()
    torch.testing.assert_close(equal.cross_entropy, equal.teacher_entropy, rtol=0, atol=1e-12)


def test_memory_can_be_written_over_before_the_backward_pass() -> None:
    student, teacher, memory = unit([5, 4], 1).requires_grad_(), unit([5, 4], 2), unit([20, 4], 3)
    (expected,) = torch.autograd.grad(memory_relation(student, teacher, memory, 0.1, 0.1).cross_entropy.sum(), student)
    loss = memory_relation(student, teacher, memory, 0.1, 0.1).cross_entropy.sum()
    memory.zero_()
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)


def test_neither_teacher_nor_memory_receives_a_gradient() -> None:
    student, teacher, memory = (unit([n, 4], n).requires_grad_() for n in (5, 5, 20))
    memory_relation(student, teacher, memory, 0.1, 0.1).cross_entropy.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert memory.grad is None


def test_chunks_change_loss_and_gradient_by_no_more_than_a_millionth() -> None:
    student, teacher, memory = (unit([n, 32], n).float() for n in (16, 17, 4096))
    found = []
    for chunk in (None, 1000):
        leaf = student.clone().requires_grad_()
        loss = memory_relation(leaf, teacher[:16], memory, 0.1, 0.02, chunk=chunk).cross_entropy.mean()
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("chunk", "most"), [(None, 1.1), (8192, 0.2)])
def test_memory_of_forward_and_backward_is_about_one_row_of_scores_an_image(chunk: int | None, most: float) -> None:
    rows, images, width = 65536, 256, 128
    memory = F.normalize(torch.randn(rows, width), dim=1)
    student, teacher = F.normalize(torch.randn(2, images, width), dim=2)
    student.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        relation = memory_relation(student, teacher, memory, 0.1, 0.02, torch.tensor(rows - 5), chunk)
        relation.cross_entropy.mean().backward()
    assert measured.profiler is not None
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    assert 0.1 < held.max().item() / (4 * images * rows) < most


def test_info_nce_is_the_cross_entropy_of_the_positive() -> None:
    logits, positive = 3 * Q([4, 6], 1), torch.tensor([5, 0, 2, 2])
    expected = torch.stack([-row.softmax(0)[place].log() for row, place in zip(logits, positive, strict=True)])
    torch.testing.assert_close(info_nce(logits, positive), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(info_nce(logits), info_nce(logits, torch.arange(4)))


def test_info_nce_at_an_infinite_temperature_is_the_log_of_the_number_of_keys() -> None:
    torch.testing.assert_close(info_nce(Q([4, 6], 1) / 1e12), torch.full((4,), math.log(6), dtype=torch.float64))


def test_noise_contrast_is_that_of_the_literal_formula() -> None:
    logits, normalizer, samples = 3 * Q([4, 6], 1), torch.tensor(7.0, dtype=torch.float64), 30
    ratio = logits.exp() / normalizer
    noise = 5 / samples
    expected = -(ratio[:, 0] / (ratio[:, 0] + noise + 1e-7)).log()
    negatives = -(noise / (ratio[:, 1:] + noise + 1e-7)).log()
    torch.testing.assert_close(noise_contrast(logits, normalizer, samples), expected + negatives.sum(1))
    weight = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(
        noise_contrast(logits, normalizer, samples, weight), expected + (weight * negatives).sum(1)
    )
