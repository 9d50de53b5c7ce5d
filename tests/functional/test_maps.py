from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, softplus

from distill.functional import (
    activation_boundaries,
    attention_map,
    attention_transfer,
    factor_transfer,
    flow_matrix,
    fsp,
    hierarchical_context_loss,
    pool,
    to_common_grid,
    vid,
)
from tests.golden import Q, assert_relative

SEEDS = st.integers(1, 10_000)
STUDENT, TEACHER_5, TEACHER_7 = Q([4, 5, 8, 8], 6), Q([4, 5, 8, 8], 7), Q([4, 7, 8, 8], 8)


@pytest.mark.parametrize(
    ("loss", "figure"),
    [
        (lambda student: attention_transfer(student, TEACHER_7), "at"),
        (lambda student: factor_transfer(student, TEACHER_7), "ft"),
        (lambda student: 3 / 1000 * activation_boundaries(student, TEACHER_5), "ab"),
        (lambda student: fsp([student, Q([4, 6, 4, 4], 10)], [TEACHER_5, Q([4, 6, 4, 4], 11)]), "fsp"),
        (lambda student: hierarchical_context_loss(student, TEACHER_5), "review_kd"),
    ],
    ids=["at", "ft", "ab", "fsp", "hcl"],
)
def test_value_and_gradient_are_the_golden_ones(loss: Callable[[Tensor], Tensor], figure: str) -> None:
    student = STUDENT.clone().requires_grad_()
    assert_relative(figure, loss(student), student)


def test_value_and_gradient_of_vid_are_the_golden_ones() -> None:
    student = STUDENT.clone().requires_grad_()
    weights = [0.5 * Q([7, channels], seed) for channels, seed in ((5, 12), (7, 13), (7, 14))]
    mean = torch.einsum("oc,bchw->bohw", weights[0], student).relu()
    mean = torch.einsum("oc,bchw->bohw", weights[2], torch.einsum("oc,bchw->bohw", weights[1], mean).relu())
    log_scale = torch.full((7,), math.log(math.exp(5 - 1e-5) - 1), dtype=torch.float64)
    assert_relative("vid", vid(mean, softplus(log_scale) + 1e-5, TEACHER_7), student)


@settings(max_examples=30, deadline=None)
@given(side=st.tuples(st.integers(1, 9), st.integers(1, 9)), share=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_pooling_is_adaptive_average_pooling(side: tuple[int, int], share: tuple[int, int]) -> None:
    grid = min(side[0], share[0]), min(side[1], share[1])
    x = Q([2, 3, *side], 4).requires_grad_()
    ours, expected = pool(x, grid), adaptive_avg_pool2d(x, grid)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(pooled.square().sum(), x)[0] for pooled in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_pooling_to_the_own_grid_copies_nothing() -> None:
    assert pool(STUDENT, (8, 8)) is STUDENT


def test_the_common_grid_is_the_smaller_in_each_direction() -> None:
    x, y = to_common_grid(Q([2, 3, 4, 9], 1), Q([2, 5, 6, 7], 2))
    assert (x.shape, y.shape) == ((2, 3, 4, 7), (2, 5, 4, 7))


def literal_attention(x: Tensor) -> list[list[float]]:
    maps = []
    for image in x.tolist():
        height, width = len(image[0]), len(image[0][0])
        cells = [sum(channel[i][j] ** 2 for channel in image) / len(image) for i in range(height) for j in range(width)]
        length = math.sqrt(sum(cell**2 for cell in cells))
        maps.append([cell / length for cell in cells])
    return maps


def test_at_and_ft_are_the_literal_means_over_the_cells() -> None:
    student, teacher = Q([3, 4, 2, 5], 1), Q([3, 2, 2, 5], 2)
    pairs = [
        (a, b)
        for own, other in zip(literal_attention(student), literal_attention(teacher), strict=True)
        for a, b in zip(own, other, strict=True)
    ]
    assert attention_transfer(student, teacher).item() == pytest.approx(
        sum((a - b) ** 2 for a, b in pairs) / len(pairs), rel=1e-12
    )
    assert factor_transfer(student, teacher).item() == pytest.approx(
        sum(abs(a - b) for a, b in pairs) / len(pairs), rel=1e-12
    )


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 100), order=st.permutations(range(5)))
def test_attention_knows_neither_the_scale_nor_the_order_of_channels(seed: int, scale: float, order: list[int]) -> None:
    x = Q([2, 5, 3, 4], seed)
    torch.testing.assert_close(attention_map(scale * x[:, order]), attention_map(x), rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_attention_maps_have_length_one_and_no_negative_cell(seed: int) -> None:
    attention = attention_map(Q([3, 4, 3, 3], seed))
    torch.testing.assert_close(attention.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert bool((attention >= 0).all())


@pytest.mark.parametrize("loss", [attention_transfer, factor_transfer])
def test_the_larger_grid_is_pooled_to_the_smaller_on_either_side(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    large, small = Q([2, 3, 6, 6], 1), Q([2, 4, 3, 3], 2)
    pooled = adaptive_avg_pool2d(large, 3)
    torch.testing.assert_close(loss(large, small), loss(pooled, small))
    torch.testing.assert_close(loss(small, large), loss(small, pooled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_without_activity_has_no_attention_and_no_gradient(dtype: torch.dtype) -> None:
    student = torch.zeros(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    loss = attention_transfer(student, Q([2, 3, 4, 4], 1).to(dtype))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(1 / 16)
    assert not gradient.any()


def test_vid_is_the_gaussian_log_likelihood_up_to_its_constant() -> None:
    mean, teacher, variance = Q([3, 4, 2, 2], 1), Q([3, 4, 2, 2], 2), Q([4], 3).abs() + 0.1
    gaussian = torch.distributions.Normal(mean, variance.sqrt().view(4, 1, 1))
    expected = -gaussian.log_prob(teacher).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(vid(mean, variance, teacher), expected)


def test_vid_is_least_where_the_variance_is_the_mean_squared_error_of_its_channel() -> None:
    mean, teacher = Q([3, 4, 2, 2], 1), Q([3, 4, 2, 2], 2)
    variance = (mean - teacher).square().mean(dim=(0, 2, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(vid(mean, variance, teacher), variance)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def literal_hinge(s: float, t: float, m: float) -> float:
    if t > 0:
        return (s - m) ** 2 if s <= m else 0.0
    return (s + m) ** 2 if s > -m else 0.0


@pytest.mark.parametrize("margin", [0.25, 1.0, 2.0])
def test_ab_is_the_literal_hinge_summed_over_an_image(margin: float) -> None:
    student, teacher = 2 * Q([3, 4, 2, 5], 1), Q([3, 4, 2, 5], 2)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum(literal_hinge(s, t, margin) for s, t in pairs) / 3
    assert activation_boundaries(student, teacher, margin).item() == pytest.approx(expected, rel=1e-12)


def test_ab_asks_for_the_side_and_the_margin_alone() -> None:
    teacher = Q([2, 3, 4, 4], 1)
    beyond = torch.where(teacher > 0, 1.5, -7.0).double()
    assert activation_boundaries(beyond, teacher).item() == 0.0
    assert activation_boundaries(beyond, 100 * teacher).item() == 0.0
    assert activation_boundaries(-beyond, teacher).item() > 0


def test_a_flow_matrix_is_the_literal_mean_of_products() -> None:
    lower, upper = Q([2, 3, 2, 4], 1), Q([2, 5, 2, 4], 2)
    flow = flow_matrix(lower, upper)
    for image in range(2):
        for c in range(3):
            for d in range(5):
                products = [
                    lower[image, c, i, j].item() * upper[image, d, i, j].item() for i in range(2) for j in range(4)
                ]
                assert flow[image, c, d].item() == pytest.approx(sum(products) / 8, rel=1e-12)


def test_fsp_sums_over_the_pairs_of_consecutive_layers() -> None:
    student = [Q([2, 3, 8, 8], 1), Q([2, 4, 4, 4], 2), Q([2, 5, 2, 2], 3)]
    teacher = [Q([2, 3, 6, 6], 4), Q([2, 4, 6, 6], 5), Q([2, 5, 3, 3], 6)]
    expected = fsp(student[:2], teacher[:2]) + fsp(student[1:], teacher[1:])
    torch.testing.assert_close(fsp(student, teacher), expected)


def test_the_flow_does_not_know_where_a_cell_lies() -> None:
    lower, upper = Q([2, 3, 4, 4], 1), Q([2, 5, 4, 4], 2)
    turned = flow_matrix(lower.flip(2).mT, upper.flip(2).mT)
    torch.testing.assert_close(turned, flow_matrix(lower, upper))


def test_hcl_weighs_the_pools_by_halves() -> None:
    student, teacher = Q([2, 3, 6, 5], 1), Q([2, 3, 6, 5], 2)
    difference = student - teacher  # pooling is linear
    parts = [(1.0, difference)] + [
        (weight, adaptive_avg_pool2d(difference, side)) for weight, side in ((0.5, 4), (0.25, 2), (0.125, 1))
    ]
    expected = sum(weight * part.square().mean().item() for weight, part in parts) / 1.875
    assert hierarchical_context_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("side", "levels"), [(4, (2, 1)), (2, (1,)), (1, ())])
def test_hcl_leaves_out_pools_that_are_no_coarser(side: int, levels: tuple[int, ...]) -> None:
    student, teacher = Q([2, 3, side, side], 1), Q([2, 3, side, side], 2)
    torch.testing.assert_close(
        hierarchical_context_loss(student, teacher), hierarchical_context_loss(student, teacher, levels)
    )


@pytest.mark.parametrize(
    "loss",
    [
        attention_transfer,
        factor_transfer,
        hierarchical_context_loss,
        lambda x, y: fsp([x, x.square()], [y, y.square()]),
        lambda x, y: activation_boundaries(3 * x.sign(), y),
    ],
    ids=["at", "ft", "hcl", "fsp", "ab"],
)
def test_a_student_that_is_its_teacher_has_no_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert loss(STUDENT, STUDENT.clone()).item() == 0.0


@pytest.mark.parametrize(
    "loss",
    [
        attention_transfer,
        factor_transfer,
        activation_boundaries,
        hierarchical_context_loss,
        lambda x, y: fsp([x, x.square()], [y, y.square()]),
        lambda x, y: vid(x, y.new_ones(3), y),
    ],
    ids=["at", "ft", "ab", "hcl", "fsp", "vid"],
)
def test_the_loss_of_a_batch_is_the_mean_over_its_images(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = Q([4, 3, 5, 6], 1), Q([4, 3, 5, 6], 2)
    each = [loss(s, t) for s, t in zip(student.split(1), teacher.split(1), strict=True)]
    torch.testing.assert_close(loss(student, teacher), torch.stack(each).mean())


@pytest.mark.parametrize(
    "loss",
    [attention_transfer, factor_transfer, activation_boundaries, hierarchical_context_loss],
    ids=["at", "ft", "ab", "hcl"],
)
def test_gradients_are_the_derivatives(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student = Q([2, 3, 5, 6], 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, Q([2, 3, 5, 6], 2)), (student,))
