from __future__ import annotations

import pytest
import torch

from distill.functional import cell_moments, gaussian_distance
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs


@pytest.mark.parametrize("name", ["wkd_f_aligned", "wkd_f_aligned_grid"])
def test_value_and_gradient_are_the_golden_ones(name: str) -> None:
    x, params = inputs(name), CASES[name]["params"]
    loss = gaussian_distance(x["f"], x["g"], params["grid"], params["ratio"], params["eps"])
    assert_case(name, loss, x.__getitem__)


@pytest.mark.parametrize(("size", "grid"), [((8, 8), 1), ((7, 7), 3), ((5, 8), 4), ((3, 2), 1)])
def test_moments_are_those_of_the_pixels_of_each_cell(size: tuple[int, int], grid: int) -> None:
    x = 3 + Q([2, 3, *size], 1)
    mean, deviation = cell_moments(x, grid)
    for row in range(grid):
        for column in range(grid):
            cell = x[
                ...,
                row * size[0] // grid : -(-(row + 1) * size[0] // grid),
                column * size[1] // grid : -(-(column + 1) * size[1] // grid),
            ].flatten(2)
            torch.testing.assert_close(mean[..., row, column], cell.mean(2))
            torch.testing.assert_close(deviation[..., row, column], (cell.var(2) + 1e-5).sqrt())


def test_a_large_mean_does_not_swallow_the_deviation() -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    for shift in (0.0, 1e4):
        torch.testing.assert_close(cell_moments(x + shift)[1].item(), (1 / 3 + 1e-5) ** 0.5)


def test_with_ratio_one_it_is_the_squared_distance_of_two_gaussians() -> None:
    """|mu_s - mu_t|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2) for diagonal covariances S and T."""
    student, teacher = Q([1, 4, 6, 6], 1), Q([1, 4, 5, 5], 2)
    means, covariances = [], []
    for x in (student, teacher):
        means.append(x.flatten(2).mean(2)[0])
        covariances.append((x.flatten(2).var(2)[0] + 1e-5).diag())
    root = covariances[0].sqrt()
    inner = torch.linalg.eigvalsh(root @ covariances[1] @ root).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * inner
    torch.testing.assert_close(gaussian_distance(student, teacher, ratio=1.0), expected)
