"""Every shipped head within torch's own DDP: two ranks take the steps of one process."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.distributed import all_sum, world_size
from distill.heads import Head, shipped
from distill.heads.kd import KD
from distill.heads.review_kd import ReviewKD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.testing import Sample
from tests.heads.test_contract import case_of
from tests.two_ranks import RankPool

EVERY_DAY = {"KD", "RKD", "RRD", "SeRKD", "TRG", "CRD", "SP", "FT", "CTKD", "MLKD"}
"""Heads of the fast suite: those of each kind. The contract holds all heads to two ranks, see `test_contract.py`."""
every_head = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[] if name in EVERY_DAY else pytest.mark.slow)
        for name, make in shipped().items()
    ],
)


class Shifting(nn.Module):
    """A student that shifts made-up features by weights of its own, with a head on it."""

    def __init__(self, head: Head, sample: Sample) -> None:
        super().__init__()
        self.head = head
        self.names = sorted(head.needs_of("student"))
        self.shifts = nn.ParameterList([torch.zeros_like(sample.student[name][0]) for name in self.names])

    def forward(self, sample: Sample) -> Tensor:
        seen = {name: sample.student[name] + shift for name, shift in zip(self.names, self.shifts, strict=True)}
        own = {name: value for name, value in seen.items() if name not in sample.student.maps}
        student = replace(
            sample.student,
            **own,  # type: ignore[arg-type]
            maps={name: seen[name] for name in sample.student.maps},
        )
        loss: Tensor = self.head(student, sample.teacher, sample.batch)
        return loss


def _two_steps(make: type[Head], static_graph: bool) -> list[dict[str, Tensor]]:
    """Loss over all ranks and DDP's gradients of each of two steps, the second with what the first left in memory."""
    case = case_of(make)
    network = Shifting(case.head(), case.sample())
    wrapped: nn.Module = network
    if world_size() > 1:  # find_unused_parameters is off: a parameter without gradient stops the second step
        names = [name for name, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(network, static_graph=static_graph)
    found = []
    for number in (3, 4):
        network.zero_grad()
        loss = wrapped(case.sample(number))
        loss.backward()
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        found.append(deepcopy({"loss": all_sum(loss) / world_size(), **gradients}))
    return found


@every_head
def test_a_head_trains_under_ddp_as_in_one_process(make: type[Head], pool: RankPool) -> None:
    assert make().scope != "batch", "its value would depend on the number of ranks"
    expected = _two_steps(make, False)
    for given in pool.run(_two_steps, make, False):
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [KD, RKD, ReviewKD, RRD])
def test_a_head_trains_under_ddp_with_a_static_graph(make: type[Head], pool: RankPool) -> None:
    expected = _two_steps(make, True)
    for given in pool.run(_two_steps, make, True):
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)
