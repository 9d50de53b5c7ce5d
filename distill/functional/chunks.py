"""Evaluation in chunks of rows, which the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUMBERS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**25}
"""Numbers of the largest tensor that is computed at a time, by device type: 16 MB on a CPU and 128 MB on a GPU."""


def rows_per_chunk(numbers: int, device: torch.device, chunk: int | None = None) -> int:
    """Return how many rows are computed at a time: `chunk` if given, else as many as make a tensor of a fixed size.

    Args:
        numbers: of a row.
        device: where it is computed.
        chunk: the user's choice.
    """
    return chunk or max(1, NUMBERS_PER_CHUNK.get(device.type, NUMBERS_PER_CHUNK["cuda"]) // max(1, numbers))


def by_rows(function: Callable[..., Tensor], chunk: int | None, *tensors: Tensor) -> Tensor:
    """Return `function(rows, *tensors)` for all rows of the first tensor, computed in chunks if given."""
    if chunk is None or chunk >= len(tensors[0]):
        return function(slice(0, len(tensors[0])), *tensors)
    result: Tensor = _InChunks.apply(function, chunk, *tensors)
    return result


class _InChunks(torch.autograd.Function):
    """Chunked evaluation that keeps only the results and recomputes in the backward pass, as checkpointing does.

    (`torch.utils.checkpoint` loads torch's compiler when it is first called, and a twice differentiable backward pass
    loads sympy: each takes seconds.)
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], chunk: int, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.parts = [slice(start, start + chunk) for start in range(0, len(tensors[0]), chunk)]
        ctx.save_for_backward(*tensors)
        return torch.cat([function(part, *tensors) for part in ctx.parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        device = ctx.saved_tensors[0].device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):  # as heads compute, wherever this is called
            for part in ctx.parts:
                torch.autograd.backward((ctx.function(part, *leaves) * gradients[0][part]).sum())
        return None, None, *(leaf.grad for leaf in leaves)
