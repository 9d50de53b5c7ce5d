from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional import channel_correlation_difference
from tests.golden import Q
from tests.new_methods import assert_case, inputs


def literal(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss by a loop over images and rows of the Gram matrices."""
    images, channels = student.shape[:2]
    total = torch.zeros((), dtype=student.dtype)
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        gram_s, gram_t = s @ s.T, t @ t.T
        for row_s, row_t in zip(gram_s, gram_t, strict=True):
            total = total + (F.normalize(row_s, dim=0) - F.normalize(row_t, dim=0)).square().sum()
    return total / (images * channels)


def test_value_and_gradient_are_the_golden_ones() -> None:
    x = inputs("ickd_aligned")
    assert_case("ickd_aligned", channel_correlation_difference(x["f"], x["g"]), x.__getitem__)


@pytest.mark.parametrize(
    "grids", [((4, 4), (6, 6)), ((2, 2), (1, 3)), ((2, 2), (4, 4))], ids=["many cells", "few cells", "either"]
)
def test_value_and_gradient_are_those_of_the_literal_formula_on_any_grids(grids: tuple[tuple[int, int], ...]) -> None:
    student, teacher = Q([3, 9, *grids[0]], 1).requires_grad_(), Q([3, 9, *grids[1]], 2)
    results = []
    for loss in (channel_correlation_difference, literal):
        value = loss(student, teacher)
        results.append((value, *torch.autograd.grad(value, student)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (2, 2)], ids=["many cells", "few cells"])
def test_channels_of_zeros_have_no_loss_and_no_gradient_between_them(grid: tuple[int, int]) -> None:
    silent = torch.ones(9, dtype=torch.float64)
    silent[2:5] = 0
    student = (Q([3, 9, *grid], 1) * silent.view(9, 1, 1)).requires_grad_()
    loss = channel_correlation_difference(student, (2 * student).detach())
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient.abs().max().item() < 1e-12


def test_few_cells_never_take_a_matrix_of_channels() -> None:
    student, teacher = torch.randn(2, 8192, 2, 2, requires_grad=True), torch.randn(2, 8192, 2, 2)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        channel_correlation_difference(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert max(sizes) <= student.numel()
