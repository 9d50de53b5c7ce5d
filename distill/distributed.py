"""Collectives for heads; without a process group each is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import UserError


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(tensor: Tensor) -> Tensor:
    """Put the rows of all ranks together in the order in which samplers deal them, with gradient.

    Row i of rank r becomes row i * W + r for W ranks, so that the result is one process's batch, row by row. Every rank
    then computes the same loss over the whole batch. The backward pass sums the gradients of all ranks, so that DDP's
    mean over ranks is exactly the gradient of a single process with the whole batch.

    Args:
        tensor: `[B, ...]`, of the same shape on every rank.

    Returns:
        `[W * B, ...]`; `tensor` itself for one rank.

    Raises:
        UserError: on every rank, if the numbers of samples differ. This is checked only on CPUs, where it costs next
            to nothing; on GPUs it would stall every step, and the data are checked before the first step.
    """
    if world_size() == 1:
        return tensor
    if tensor.is_cpu:
        _require_equal(len(tensor))
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def own_rows(tensor: Tensor) -> Tensor:
    """Return this rank's rows `[B, ...]` of a gathered tensor `[W * B, ...]`, a view of it."""
    return tensor[rank() :: world_size()]


def all_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_mean(tensor: Tensor) -> Tensor:
    """Average `tensor` over all ranks, without gradient."""
    return all_sum(tensor) / world_size()


def _require_equal(samples: int) -> None:
    count = torch.tensor([samples])
    gathered = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(gathered, count)
    counts = [int(number) for number in gathered]
    if len(set(counts)) > 1:
        raise UserError(
            f"the ranks' batches have {', '.join(map(str, counts))} samples and cannot be gathered: give every rank "
            "equally many"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return own_rows(total).contiguous()
