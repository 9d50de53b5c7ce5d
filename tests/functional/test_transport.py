from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.functional import class_cosines, class_costs, linear_cka, target_cross_entropy, transport_among_others
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs

every_case = pytest.mark.parametrize("name", ["wkd_l_fc", "wkd_l_cka", "wkd_l_plain_cost"])


def cost_of(x: dict[str, Tensor], params: dict[str, Any]) -> Tensor:
    return class_costs(class_cosines(x["W"]) if "W" in x else linear_cka(x["F"]), params["sharpen"])


def transport(x: dict[str, Tensor], params: dict[str, Any]) -> Tensor:
    settings = params["T"], params["reg"], params["iters"]
    return transport_among_others(x["s"], x["t"], x["y"], cost_of(x, params), *settings)


@every_case
def test_value_and_gradient_are_the_golden_ones(name: str) -> None:
    x, params, parts = inputs(name), CASES[name]["params"], CASES[name]["parts"]
    target, moved = target_cross_entropy(x["s"], x["t"], x["y"]).mean(), transport(x, params).mean()
    assert [target.item(), moved.item()] == pytest.approx([parts["target"], parts["wd"]], rel=1e-10)
    assert_case(name, target + params["gamma"] * moved, x.__getitem__)


@every_case
def test_transport_is_that_of_each_sample_with_its_target_cut_out(name: str) -> None:
    x, params = inputs(name), CASES[name]["params"]
    cost, found = cost_of(x, params).clamp_min(0) + 1e-8, transport(x, params)
    for sample, target in enumerate(x["y"].tolist()):
        others = [c for c in range(10) if c != target]
        own = cost[others][:, others]
        a, b = (torch.softmax(x[key][sample, others] / params["T"], 0) for key in ("s", "t"))
        kernel, u = torch.exp(-own / params["reg"]), torch.full((9,), 1 / 9, dtype=torch.float64)
        for _ in range(params["iters"]):
            v = b / (kernel.T @ u + 1e-8)
            u = a / (kernel @ v + 1e-8)
        plan = u[:, None] * kernel * v
        torch.testing.assert_close(plan.sum(1), a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[sample], (plan * own).sum(), rtol=1e-10, atol=0)


def test_alignment_of_classes_is_that_of_their_centered_features() -> None:
    x = Q([4, 7, 3], 16)
    for i, a in enumerate(x - x.mean(1, keepdim=True)):
        for j, b in enumerate(x - x.mean(1, keepdim=True)):
            expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
            torch.testing.assert_close(linear_cka(x)[i, j], expected)


def test_samples_that_are_missing_take_no_part_in_the_alignment() -> None:
    x, present = Q([3, 6, 4], 16), torch.ones(3, 6, dtype=torch.bool)
    present[:, 4:] = False
    torch.testing.assert_close(linear_cka(x, present), linear_cka(x[:, :4]))
    present[1] = False
    found = linear_cka(x, present)
    assert found[1].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[0, 2], linear_cka(x[:, :4])[0, 2])


def test_costs_grow_from_zero_for_a_class_itself_to_their_most_for_an_unrelated_one() -> None:
    similarity = torch.tensor([[0.3, 0.9, 0.0], [0.9, 1.0, 0.5], [0.0, 0.5, 1.0]])
    for sharpness, most in ((0.0, 1.0), (1.0, 1 - math.exp(-1))):
        cost = class_costs(similarity, sharpness)
        assert cost.diagonal().tolist() == [0, 0, 0]
        assert 0 < cost[0, 1] < cost[1, 2] < cost[0, 2]
        assert cost[0, 2].item() == pytest.approx(most)


@pytest.mark.parametrize("gap", [1e1, 1e3, 1e5])
def test_any_gap_between_two_logits_is_finite_in_float32(gap: float) -> None:
    student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    student[:, 1], teacher[0, 2], teacher[1, 0] = gap, gap, gap
    for sharpness in (0.0, 1.0):
        leaf = student.clone().requires_grad_()
        cost = class_costs(class_cosines(torch.eye(5)), sharpness)
        loss = transport_among_others(leaf, teacher, torch.tensor([0, 0]), cost)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert bool(loss.isfinite().all())
        assert bool(gradient.isfinite().all())
