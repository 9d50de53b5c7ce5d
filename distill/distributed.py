"""The few collectives that heads need; without a process group each is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import UserError


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the batch, in rank order, with gradient.

    Every rank then computes the same loss over the whole batch. The backward pass sums the ranks' gradients, so
    that DDP's mean over ranks gives exactly the gradient of one process that held the whole batch.

    Args:
        tensor: `[B, ...]`, of the same shape on every rank.

    Returns:
        `[W * B, ...]` for W ranks; `tensor` itself for one.

    Raises:
        UserError: on every rank, if their numbers of samples differ. It is looked at on CPUs only, where that costs
            next to nothing; on GPUs it would stall every step, and the data are looked at before the first one.
    """
    if world_size() == 1:
        return tensor
    if tensor.is_cpu:
        _require_equal(len(tensor))
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def all_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def _require_equal(samples: int) -> None:
    own = torch.tensor([samples])
    found = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(found, own)
    every = [int(other) for other in found]
    if len(set(every)) > 1:
        raise UserError(
            f"the ranks' batches have {', '.join(map(str, every))} samples and cannot be put together: give every rank "
            "equally many"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.batch = tensor.shape[0]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.batch : (rank() + 1) * ctx.batch]
