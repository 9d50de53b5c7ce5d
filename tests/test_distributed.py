from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.distributed import all_mean, all_sum, gather, own_rows, rank, world_size
from distill.errors import UserError
from tests.golden import Q
from tests.two_ranks import RankPool


def test_without_a_process_group_there_is_one_rank() -> None:
    assert (rank(), world_size()) == (0, 1)


def test_without_a_process_group_gather_is_the_tensor_itself_and_all_rows_are_own() -> None:
    tensor = Q([4, 3], 1).requires_grad_()
    assert gather(tensor) is tensor
    assert torch.equal(own_rows(tensor), tensor)


def test_without_a_process_group_all_sum_is_the_detached_tensor() -> None:
    tensor = Q([4, 3], 1).requires_grad_()
    assert torch.equal(all_sum(tensor), tensor)
    assert not all_sum(tensor).requires_grad


def _own_rank() -> tuple[int, int]:
    return rank(), world_size()


def test_each_process_has_its_place(pool: RankPool) -> None:
    assert pool.run(_own_rank) == [(0, 2), (1, 2)]


def _gathered(whole: Tensor) -> Tensor:
    own = whole[rank() :: world_size()]  # as samplers deal it
    gathered = gather(own)
    assert torch.equal(own_rows(gathered), own)
    return gathered


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_gather_puts_the_rows_together_as_they_were_dealt(pool: RankPool, dtype: torch.dtype) -> None:
    whole = (10 * Q([6, 3, 2], 1)).to(dtype)
    for gathered in pool.run(_gathered, whole):
        assert torch.equal(gathered, whole)


def _gathered_transposed(whole: Tensor) -> Tensor:
    return gather(whole[rank() :: world_size()].mT)


def test_gather_takes_a_tensor_that_is_not_contiguous(pool: RankPool) -> None:
    whole = Q([6, 3, 2], 1)
    for gathered in pool.run(_gathered_transposed, whole):
        assert torch.equal(gathered, whole.mT)


def _pairwise_gradient(whole: Tensor) -> Tensor:
    own = whole[rank() :: world_size()].clone().requires_grad_()
    x = gather(own)
    weights = torch.arange(1.0, len(x) + 1, dtype=x.dtype)  # so that the order matters
    return torch.autograd.grad(((x @ x.T).square() @ weights).mean(), own)[0]


def test_gradient_through_gather_averaged_over_ranks_is_that_of_one_process(pool: RankPool) -> None:
    whole = Q([6, 3], 1)
    expected = _pairwise_gradient(whole)
    averaged = torch.stack(pool.run(_pairwise_gradient, whole), dim=1).flatten(0, 1) / 2
    torch.testing.assert_close(averaged, expected, rtol=1e-12, atol=0)


def _refused_sizes() -> str:
    try:
        gather(torch.zeros(3 + rank(), 2))
    except UserError as error:
        return str(error)
    return "none"


def test_gather_refuses_batches_of_different_sizes_on_every_rank(pool: RankPool) -> None:
    message = "the ranks' batches have 3, 4 samples and cannot be gathered: give every rank equally many"
    assert pool.run(_refused_sizes) == [message, message]


def _summed() -> tuple[Tensor, bool, Tensor]:
    own = torch.tensor([1.0, 10.0]).requires_grad_() * (rank() + 1)
    total = all_sum(own)
    return own.detach(), total.requires_grad, total


def test_all_sum_adds_over_ranks_without_gradient_and_leaves_its_input(pool: RankPool) -> None:
    for place, (own, has_gradient, total) in enumerate(pool.run(_summed)):
        assert own.tolist() == [1.0 + place, 10.0 * (1 + place)]
        assert not has_gradient
        assert total.tolist() == [3.0, 30.0]


def _averaged() -> Tensor:
    return all_mean(torch.tensor([1.0, 10.0]) * (rank() + 1))


def test_all_mean_averages_over_ranks(pool: RankPool) -> None:
    assert all_mean(torch.tensor(3.0)) == 3.0
    assert [mean.tolist() for mean in pool.run(_averaged)] == [[1.5, 15.0]] * 2


def _fails_on_one_rank() -> Tensor:
    if rank() == 1:
        raise ValueError("on purpose")
    return all_sum(torch.ones(1))


@pytest.mark.slow
def test_pool_tells_the_error_of_one_rank_and_starts_again() -> None:
    own = RankPool(timeout=6.0)
    with pytest.raises(ValueError, match="on purpose"):
        own.run(_fails_on_one_rank)
    try:
        assert own.run(_own_rank) == [(0, 2), (1, 2)]
    finally:
        own.close()


def _waits_on_one_rank() -> None:
    if rank() == 1:
        time.sleep(60)
    dist.barrier()


@pytest.mark.slow
def test_pool_does_not_wait_forever() -> None:
    before = len(multiprocessing.active_children())
    with pytest.raises(multiprocessing.TimeoutError):
        RankPool(timeout=2.0).run(_waits_on_one_rank)
    assert len(multiprocessing.active_children()) == before
