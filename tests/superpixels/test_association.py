from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.superpixels import soft_association, soft_superpixels, superpixel_grid
from distill.superpixels.association import Grid
from tests.golden import GOLDEN, Q

GRIDS = [((6, 6), (3, 3)), ((5, 7), (3, 3)), ((7, 4), (4, 4)), ((3, 3), (1, 1)), ((1, 9), (1, 4))]


def literal(tokens: Tensor, grid: Grid, target: Grid, iterations: int, reach: int) -> tuple[Tensor, Tensor]:
    """Superpixels and association of one image, token by token."""
    home = [(i * target[0] // grid[0], j * target[1] // grid[1]) for i in range(grid[0]) for j in range(grid[1])]
    cells = [(a, b) for a in range(target[0]) for b in range(target[1])]
    q = torch.tensor([[float(cell == own) for cell in cells] for own in home], dtype=torch.float64)
    for iteration in range(iterations + 1):
        means = (q / q.sum(0)).T @ tokens
        if iteration == iterations:
            break
        for n, own in enumerate(home):
            scores = [
                tokens[n].dot(means[k]).item() / math.sqrt(tokens.shape[1])
                if max(abs(cell[0] - own[0]), abs(cell[1] - own[1])) <= reach
                else -math.inf
                for k, cell in enumerate(cells)
            ]
            exponentials = [math.exp(score) for score in scores]
            q[n] = torch.tensor([e / sum(exponentials) for e in exponentials], dtype=torch.float64)
    return means, q


@pytest.mark.parametrize(("grid", "target"), GRIDS)
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize(("neighborhood", "reach"), [("cells", 1), ("all", 99)])
def test_superpixels_and_association_are_those_of_the_literal_formula(
    grid: Grid, target: Grid, iterations: int, neighborhood: Any, reach: int
) -> None:
    tokens = Q([2, grid[0] * grid[1], 4], 7)
    options: Any = {"target": target, "iterations": iterations, "neighborhood": neighborhood}
    superpixels = soft_superpixels(tokens, grid, **options)
    association = soft_association(tokens, grid, **options)
    for image, means, q in zip(tokens, superpixels, association, strict=True):
        expected = literal(image, grid, target, iterations, reach)
        torch.testing.assert_close((means, q), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("figure", GOLDEN["serkd"], ids=lambda figure: figure["inputs"]["student"])
def test_the_first_superpixel_is_the_golden_one(figure: dict[str, Any]) -> None:
    given = figure["inputs"]
    tokens = {"2*Q([2,36,5],50)": 2 * Q([2, 36, 5], 50), "1*Q([2,24,6],60)": Q([2, 24, 6], 60)}[given["student"]]
    superpixels = soft_superpixels(tokens, tuple(given["grid"]), tuple(given["cell"]), iterations=given["iterations"])
    assert superpixels[0, 0].tolist() == pytest.approx(figure["student_superpixels_image0_row0"], rel=1e-12)


def test_no_iteration_is_average_pooling() -> None:
    tokens = Q([2, 48, 3], 4)
    pooled = torch.nn.functional.avg_pool2d(tokens.mT.unflatten(2, (6, 8)), (2, 4)).flatten(2).mT
    torch.testing.assert_close(soft_superpixels(tokens, (6, 8), (2, 4), iterations=0), pooled)


def test_a_uniform_association_is_average_pooling_over_the_cells_in_reach() -> None:
    tokens = torch.tensor([1.0, 2.0, 3.0]).expand(1, 36, 3)  # all equal, so all scores are
    assert soft_superpixels(tokens, (6, 6))[0].tolist() == [pytest.approx([1.0, 2.0, 3.0])] * 9
    association = soft_association(tokens, (6, 6))[0]
    assert association[0].tolist() == pytest.approx([0.25, 0.25, 0, 0.25, 0.25, 0, 0, 0, 0])
    assert association[14].tolist() == pytest.approx([1 / 9] * 9)


def test_nothing_lies_beyond_the_border() -> None:
    association = soft_association(Q([2, 36, 192], 3), (6, 6))
    assert association.sum(dim=2).flatten().tolist() == pytest.approx([1.0] * 72)
    assert torch.equal(association[0, 0] > 0, torch.tensor([1, 1, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool))


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 12), (6, 6)])
def test_networks_of_any_grid_meet_on_one_target(grid: Grid) -> None:
    rows = (torch.arange(grid[0], dtype=torch.float64) + 0.5) / grid[0]
    tokens = rows.view(1, -1, 1, 1).expand(1, *grid, 1).flatten(1, 2)
    superpixels = soft_superpixels(tokens, grid, target=(3, 3), iterations=0)
    for found, expected in zip(superpixels.view(3, 3)[:, 0].tolist(), (1 / 6, 1 / 2, 5 / 6), strict=True):
        assert found == pytest.approx(expected, abs=1 / grid[0])


def test_gradient_through_values_leaves_the_weights_alone() -> None:
    tokens = Q([1, 16, 3], 4).requires_grad_()
    weights = soft_association(tokens.detach(), (4, 4))
    weights = weights / weights.sum(1, keepdim=True)
    out = Q([1, 4, 3], 5)
    (gradient,) = torch.autograd.grad((soft_superpixels(tokens, (4, 4)) * out).sum(), tokens)
    torch.testing.assert_close(gradient, weights @ out)


def test_full_gradient_is_the_derivative() -> None:
    tokens = Q([1, 15, 3], 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: soft_superpixels(t, (3, 5), iterations=2, gradient="full"), (tokens,))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("gradient", ["values", "full"])
def test_extreme_tokens_give_finite_superpixels_and_gradients(value: float, gradient: Any) -> None:
    tokens = (value * Q([2, 36, 8], 9)).float().requires_grad_()
    superpixels = soft_superpixels(tokens, (6, 6), iterations=2, gradient=gradient)
    (found,) = torch.autograd.grad(superpixels.sum(), tokens)
    assert bool(superpixels.isfinite().all())
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (5, 7)}, "35 tokens of a 5 x 7 grid"),
        ({"grid": (6, 6), "target": (7, 3)}, "target cannot be 7 x 3 superpixels for 6 x 6 tokens"),
        ({"grid": (6, 6), "target": (0, 3)}, "target cannot be 0 x 3 superpixels"),
        ({"grid": (6, 6), "cell": (0, 2)}, "at least 1 x 1 tokens, given 0 x 2"),
        ({"grid": (6, 6), "iterations": -1}, "iterations must be at least 0, given -1"),
        ({"grid": (6, 6), "neighborhood": "cell"}, "did you mean 'cells'"),
        ({"grid": (6, 6), "gradient": "value"}, "did you mean 'values'"),
    ],
)
def test_what_does_not_fit_is_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        soft_superpixels(Q([2, 36, 5], 1), **arguments)


@pytest.mark.parametrize(
    ("grid", "cell", "expected"), [((14, 14), (2, 2), (7, 7)), ((7, 9), (2, 4), (4, 3)), ((3, 3), (4, 4), (1, 1))]
)
def test_cells_cut_off_at_the_border_count(grid: Grid, cell: Grid, expected: Grid) -> None:
    assert superpixel_grid(grid, cell) == expected
