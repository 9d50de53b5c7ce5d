from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from distill.functional import cosine_distance, resize, squared_difference
from tests.golden import Q


def test_the_squared_difference_is_a_mean_over_every_number() -> None:
    student, teacher = Q([2, 3, 4], 1), Q([2, 3, 4], 2)
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert squared_difference(student, teacher).item() == pytest.approx(
        sum((s - t) ** 2 for s, t in pairs) / len(pairs)
    )


def test_the_cosine_distance_is_a_mean_over_the_vectors_and_ignores_their_lengths() -> None:
    student, teacher = Q([2, 3, 4], 1), Q([2, 3, 4], 2)
    cosines = [
        sum(a * b for a, b in zip(s, t, strict=True)) / (sum(a * a for a in s) * sum(b * b for b in t)) ** 0.5
        for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True)
    ]
    assert cosine_distance(student, teacher).item() == pytest.approx(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(cosine_distance(7 * student, 0.1 * teacher), cosine_distance(student, teacher))


def test_a_vector_of_zeros_has_the_cosine_distance_1_and_a_finite_gradient() -> None:
    student = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    loss = cosine_distance(student, Q([2, 4], 1))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 1
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("grid", [(7, 7), (3, 9), (12, 2), (1, 1), (5, 6)])
def test_resizing_is_bilinear_interpolation_with_its_gradient(grid: tuple[int, int]) -> None:
    x = Q([2, 3, 5, 6], 1).requires_grad_()
    expected = interpolate(x, grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize(x, grid), expected)
    weights = Q(list(expected.shape), 2)
    gradients = [torch.autograd.grad((weights * y).sum(), x)[0] for y in (resize(x, grid), expected)]
    torch.testing.assert_close(*gradients)
