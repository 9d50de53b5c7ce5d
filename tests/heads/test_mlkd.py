from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.distributed import all_mean, gather, own_rows, world_size
from distill.errors import UserError
from distill.features import Features
from distill.functional import mlkd
from distill.heads.mlkd import MLKD
from tests.golden import Q
from tests.new_methods import CASES, assert_case, inputs
from tests.two_ranks import RankPool

VIEW = torch.arange(16) // 8


@pytest.mark.parametrize("name", ["mlkd", "lskd_mlkd"])
def test_value_and_gradient_of_two_views_are_the_golden_ones(name: str) -> None:
    case, figures = inputs(name), CASES[name]
    weight, ce = figures["params"]["weight"], figures["params"]["ce"]
    head = MLKD(figures["params"]["T"], standardize=figures["params"]["standardise"])
    student, teacher = torch.cat([case["s"], case["s2"]]), torch.cat([case["t"], case["t2"]])
    loss = weight * head(Features(student), Features(teacher), {"view": VIEW})
    task = ce * (cross_entropy(case["s"], case["y"]) + cross_entropy(case["s2"], case["y"]))
    assert_case(name, loss + task, case.__getitem__)
    parts = {key: weight * value.item() for key, value in head.diagnostics().items()}
    expected = {"instances": "kd", "classes": "cc", "batch": "bc"}
    assert parts == pytest.approx({key: figures["parts"][figure] for key, figure in expected.items()}, rel=1e-10)


def test_one_view_is_the_plain_function_whatever_its_masks() -> None:
    student, teacher = 2 * Q([7, 5], 1), 3 * Q([7, 5], 2)
    for arguments in ({}, {"masks": "rows"}, {"standardize": True}):
        found = MLKD(**arguments)(Features(student), Features(teacher), {})  # type: ignore[arg-type]
        assert torch.equal(found, sum(mlkd(student, teacher, **arguments), torch.zeros(())))  # type: ignore[arg-type]


def share(student: Tensor, teacher: Tensor, view: Tensor | None, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The mean over the ranks of the loss and of its gradient, each rank with its part of every view."""
    own = own_rows(student).clone().requires_grad_()
    batch = {} if view is None else {"view": own_rows(view)}
    loss = MLKD(**arguments)(Features(own), Features(own_rows(teacher)), batch)
    (gradient,) = torch.autograd.grad(loss, own)
    return all_mean(loss), gather(gradient) / world_size()


@pytest.mark.parametrize("view", [None, VIEW])
def test_the_batch_is_that_of_all_ranks(view: Tensor | None, pool: RankPool) -> None:
    student, teacher = 2 * Q([16, 5], 1), 3 * Q([16, 5], 2)
    expected = share(student, teacher, view, {})
    for found in pool.run(share, student, teacher, view, {}):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (found, _), (other, _) = pool.run(share, student, teacher, view, {"scope": "batch"})
    assert found == other
    assert not torch.isclose(found, expected[0], rtol=1e-3), "at scope batch each rank has a batch of its own"


def test_unknown_masks_and_scopes_are_refused() -> None:
    with pytest.raises(UserError, match="masks cannot be 'columns'"):
        MLKD(masks="columns")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="MLKD has no scope 'image'"):
        MLKD(scope="image")
    with pytest.raises(UserError, match="temperature must be above 0"):
        MLKD(temperature=0.0)
