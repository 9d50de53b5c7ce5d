"""Heads that relate the images of all ranks: each rank computes its own rows, and together they are one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.distributed import all_mean, gather, own_rows, rows_of_this_rank, world_size
from distill.features import Features, FeatureSpec
from distill.functional import node_contrast, relative_squared_distances
from distill.functional.angles import COSINES_PER_CHUNK
from distill.heads import CC, DCD, IRG, MLKD, PKT, RKD, SP, TRG, VRM, Head
from distill.testing import Case, two_ranks_equal_one
from tests.golden import Q
from tests.heads.test_ddp import Shifting
from tests.two_ranks import RankPool

HEADS: dict[str, Callable[..., Head]] = {
    "RKD": RKD,
    "RKD, distances": partial(RKD, angle=0.0),
    "RKD, angles": partial(RKD, distance=0.0),
    "SP": SP,
    "PKT": PKT,
    "CC": CC,
    "IRG": IRG,
    "DCD": DCD,
    "MLKD": MLKD,
    "MLKD, rows": partial(MLKD, masks="rows"),
    "VRM": VRM,
    "VRM, all": partial(VRM, edges="all", classes="stacked", huber="discard", delta=0.3),
    "TRG": partial(TRG, contextual_weight=0.0),
    "TRG, printed": partial(TRG, mode="paper", contextual_weight=0.0, tokens_per_image=3),
    "TRG, contrast": partial(TRG, local_weight=0.0, contextual_weight=0.0),
    "TRG, in chunks": partial(TRG, tokens_per_image=None, chunk=20),
}
IMAGES = 256
SPEC = FeatureSpec(logits=(5,), embedding=(7,), tokens=(8, 7), grid=(2, 4))
SQUARE = {"RKD", "RKD, angles"}
"""Those that need the Gram matrix of all images on each rank."""
MASKS = {"VRM", "VRM, all"}
"""Those that choose among all pairs on each rank, by one number a pair."""


class Work(TorchDispatchMode):
    """Counts the multiplications of matrix products, the numbers of all results, and those of the largest."""

    products, numbers, largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self.numbers += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.products += results.numel() * args[-2].shape[-1]
        return results


def _work(name: str) -> tuple[int, int, int]:
    """Multiplications in a head's matrix products, forward and backward, numbers of all results and of the largest."""
    case = Case(HEADS[name], SPEC, SPEC, size=IMAGES)
    head, sample = case.head(torch.float32, calls=1), case.sample(dtype=torch.float32)
    student = sample.student.apply(lambda tensor: tensor.requires_grad_())
    with Work() as work:
        head(student, sample.teacher, sample.batch).backward()
    return work.products, work.numbers, work.largest


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("SP", "RKD, distances") else pytest.mark.slow)
        for name in HEADS
        if name != "TRG, in chunks"
    ],
)
def test_each_of_two_ranks_does_half_of_the_work(name: str, pool: RankPool) -> None:
    products, numbers, largest = _work(name)
    for own_products, own_numbers, own_largest in pool.run(_work, name):
        if name in SQUARE:
            assert own_numbers <= 0.6 * numbers
            assert own_largest <= max(IMAGES**2, COSINES_PER_CHUNK["cpu"]), "more than the Gram matrix of all images"
            continue
        if name not in MASKS:
            assert own_largest <= 0.5 * largest
        if products:  # there are none in VRM
            assert own_products <= 0.6 * products


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_equal_one_process(name: str, pool: RankPool) -> None:
    two_ranks_equal_one(Case(HEADS[name]), pool.run)
    two_ranks_equal_one(Case(HEADS[name], size=24), pool.run)


def _trained(name: str, batches: int, dtype: torch.dtype | None) -> list[Any]:
    """Losses and weights of three optimizer steps of some batches each, in DDP, under autocast if a type is given."""
    case = Case(HEADS[name])
    network = Shifting(case.head(), case.sample())
    wrapped: Any = network
    if world_size() > 1:
        buffers = [buffer for buffer, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    found: list[Any] = []
    for step in range(3):
        optimizer.zero_grad()
        for number in range(batches):
            waits = world_size() > 1 and number < batches - 1
            with (
                wrapped.no_sync() if waits else nullcontext(),
                nullcontext() if dtype is None else torch.autocast("cpu", dtype),
            ):
                loss = wrapped(case.sample(10 * step + number)) / batches
            with wrapped.no_sync() if waits else nullcontext():
                loss.backward()
            found.append(all_mean(loss))
        optimizer.step()
        found.append(deepcopy(network.state_dict()))
    return found


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "RKD" else pytest.mark.slow) for name in HEADS]
)
def test_two_ranks_train_as_one_process(name: str, dtype: Any, batches: int, pool: RankPool) -> None:
    expected = _trained(name, batches, dtype)
    for found in pool.run(_trained, name, batches, dtype):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def _related(make: type[Head], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    own = own_rows(student).clone().requires_grad_()
    loss = make()(Features(embedding=own), Features(embedding=own_rows(teacher)), {})
    return all_mean(loss), gather(torch.autograd.grad(loss, own)[0]) / world_size()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [RKD, IRG])
def test_equal_images_on_different_ranks_have_distance_zero(make: type[Head], dtype: Any, pool: RankPool) -> None:
    student, teacher = Q([12, 300], 1).to(dtype) + 5, Q([12, 200], 2).to(dtype) + 5
    student[[1, 4, 7]], teacher[[3, 6]] = student[[0, 0, 2]], teacher[[2, 1]]
    expected = _related(make, student, teacher)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for found in pool.run(_related, make, student, teacher):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _largest_gradient(x: Tensor, weight: Tensor) -> Tensor:
    own, rows = own_rows(x).clone().requires_grad_(), rows_of_this_rank()
    relation = relative_squared_distances(gather(own), rows)
    loss = (relation * weight[rows.index]).sum()
    return gather(torch.autograd.grad(loss, own)[0])


def test_the_gradient_of_the_largest_of_equal_distances_is_spread_over_them_on_all_ranks(pool: RankPool) -> None:
    corners = torch.eye(8, dtype=torch.float64)  # all equally far from each other
    corners[5] *= 0.9
    weight = Q([8, 8], 3)
    for found in pool.run(_largest_gradient, corners, weight):
        torch.testing.assert_close(found, _largest_gradient(corners, weight), rtol=1e-10, atol=1e-10)


def _contrast_of_rank(student: Tensor, teacher: Tensor) -> Tensor:
    rows = rows_of_this_rank()
    return node_contrast(student[rows.index], teacher, 0.3, 2, rows)


def test_rows_of_a_rank_are_those_of_one_process(pool: RankPool) -> None:
    student, teacher = Q([10, 4], 1), Q([10, 4], 2)
    whole = _contrast_of_rank(student, teacher)
    for place, found in enumerate(pool.run(_contrast_of_rank, student, teacher)):
        torch.testing.assert_close(found, whole[place::2], rtol=1e-12, atol=0)
