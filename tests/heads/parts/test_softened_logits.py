"""Options that all softened losses share, against the whole contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from distill.distributed import all_mean, own_rows
from distill.features import Features
from distill.heads import DIST, DKD, KD, MLKD, RLD, CurriculumTemperature, Head
from distill.testing import check_head
from tests.golden import Q
from tests.two_ranks import RankPool


def learned(kind: Callable[..., Head]) -> Head:
    return kind(temperature=CurriculumTemperature(gradient_scale=1.0), standardize=True)


OPTIONS: list[Callable[[], Head]] = [
    partial(KD, standardize=True),
    partial(DIST, standardize=True),
    partial(MLKD, standardize=True, masks="rows"),
    partial(learned, RLD),
]
"""Each option, and each way in which a head uses it; the others are left to the slow suite."""
FURTHER: list[Callable[[], Head]] = [
    *(partial(kind, standardize=True) for kind in (DKD, RLD, MLKD)),
    *(partial(learned, kind) for kind in (KD, DKD, DIST, MLKD)),
]


@pytest.mark.parametrize("make", [*OPTIONS, *(pytest.param(make, marks=pytest.mark.slow) for make in FURTHER)])
def test_an_option_keeps_the_whole_contract(make: Callable[[], Head], pool: RankPool) -> None:
    check_head(make, run=pool.run)


def gradient_of_theta(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks, as DDP takes it."""
    head = DKD(temperature=CurriculumTemperature(gradient_scale=-0.5)).double()
    label = torch.arange(len(student)) % 5 - 1  # some are unlabeled, unevenly over the ranks
    loss = head(Features(own_rows(student)), Features(own_rows(teacher)), {"label": own_rows(label)})
    (gradient,) = torch.autograd.grad(loss, list(head.parameters()))
    return all_mean(gradient)


def test_ranks_learn_the_temperature_of_one_process(pool: RankPool) -> None:
    student, teacher = 2 * Q([10, 6], 1), 3 * Q([10, 6], 2)
    expected = gradient_of_theta(student, teacher)
    for found in pool.run(gradient_of_theta, student, teacher):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
