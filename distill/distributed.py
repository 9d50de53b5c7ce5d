"""Collectives for heads; without a process group each is the identity."""

from __future__ import annotations

from dataclasses import dataclass
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
    then computes a loss whose mean over the ranks is that of the whole batch: the same one, or its own share (`Rows`).
    The backward pass sums the gradients of all ranks, so that DDP's mean over ranks is exactly the gradient of a single
    process with the whole batch.

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


@dataclass(frozen=True)
class Rows:
    """The rows of a relation among many samples that this process computes, each against all columns.

    On W ranks of B samples each, rank r takes the rows of its own samples in the gathered batch, r, r + W, ..., and so
    B x W B entries instead of (W B)^2. A mean over these rows is the rank's share of the loss: DDP's mean over the
    ranks, of values and of gradients, is that of one process with all rows. A sum over the rows is made a share by the
    factor W. Whatever depends on all entries, such as their mean, goes through `gather`, `sum` or `amax`, which all
    ranks call alike.

    Without arguments, all rows are this process's own.

    Attributes:
        rank: r.
        ranks: W.
    """

    rank: int = 0
    ranks: int = 1

    @property
    def index(self) -> slice:
        """The index of the own rows among all."""
        return slice(self.rank, None, self.ranks)

    def gather(self, tensor: Tensor) -> Tensor:
        """Put values of the own rows, `[B, ...]`, together with those of all rows, `[W B, ...]`, with gradient."""
        return tensor if self.ranks == 1 else gather(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, with gradient: the backward pass sums the gradients of all ranks' shares."""
        if self.ranks == 1:
            return tensor
        total: Tensor = _Sum.apply(tensor)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all rows of a tensor `[B, ...]` of the own ones, a scalar, with gradient."""
        return self.sum(tensor.mean()) / self.ranks

    def amax(self, tensor: Tensor) -> Tensor:
        """Return the largest entries `[..., 1, 1]` over all rows of `[..., B, W B]`, with gradient.

        Like that of `torch.amax`, the gradient is spread evenly over entries that are equal.
        """
        largest = tensor.amax(dim=(-2, -1), keepdim=True)
        if self.ranks == 1:
            return largest
        largest = largest.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        is_largest = tensor == largest
        parts = (part.sum(dim=(-2, -1), keepdim=True) for part in (tensor.where(is_largest, 0), is_largest.to(tensor)))
        total, count = self.sum(torch.stack(list(parts)))
        mean: Tensor = total / count.detach().clamp_min(1)
        return largest + (mean - mean.detach())


ALL_ROWS = Rows()
"""All rows, computed by one process."""


def rows_of_this_rank() -> Rows:
    """Return the rows of this rank's samples in a gathered batch; all rows without a process group."""
    return Rows(rank(), world_size())


def mean_over_ranks(total: Tensor, mass: Tensor) -> Tensor:
    """Return this rank's share of a weighted mean over the samples of all ranks.

    DDP averages over ranks; the average of these shares is the sum of all totals over the sum of all masses, however
    unevenly the mass (of labeled samples, say) is distributed.

    Args:
        total: scalar, the weighted sum over this rank's samples.
        mass: scalar, the sum of their weights.

    Returns:
        A scalar; 0 with zero gradient if no rank has any mass, where `total` must be 0 too.
    """
    mass = all_mean(mass.to(total))
    return total / mass.masked_fill(mass == 0, 1.0)


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
        gradient = gradients[0]
        by_rank = gradient.reshape(-1, world_size(), *gradient.shape[1:]).transpose(0, 1)
        total = torch.empty_like(by_rank[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(total, by_rank.flatten(0, 1).contiguous())
        return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
