"""Contrastive losses: over a memory, over a batch, against noise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.chunks import rows_per_chunk


class MemoryRelation(NamedTuple):
    """Comparison of two networks' distributions over one memory, each entry `[B]`.

    Attributes:
        cross_entropy: of the student's distribution under the teacher's; the gradient flows through it.
        teacher_entropy: the lower limit of the cross entropy; their difference is KL(teacher || student).
        student_entropy: of the student's distribution.
    """

    cross_entropy: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor


def memory_relation(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    filled: Tensor | int | None = None,
    chunk: int | None = None,
) -> MemoryRelation:
    """Compare softmax(memory student / T_s) with softmax(memory teacher / T_t).

    The logits are linear in the memory, so that every quantity follows from the mean row under each distribution.
    At most one `[B, chunk]` tensor exists at a time and none is kept for the backward pass, before which the memory may
    be overwritten.

    Args:
        student: `[B, d]`; nothing else receives a gradient.
        teacher: `[B, d]`.
        memory: `[K, d]`, of any floating type.
        student_temperature: T_s.
        teacher_temperature: T_t.
        filled: number of leading rows that are scored; by default all. With 0, everything is 0.
        chunk: rows scored at a time; by default as many as make 4 million logits, 32 million on a GPU.
    """
    student, teacher = student / student_temperature, teacher.detach() / teacher_temperature
    student_sum, student_mean = softmax_over_memory(student, memory, filled, chunk)
    teacher_sum, teacher_mean = softmax_over_memory(teacher, memory, filled, chunk)
    return MemoryRelation(
        cross_entropy=student_sum - (student * teacher_mean).sum(dim=-1),
        teacher_entropy=teacher_sum - (teacher * teacher_mean).sum(dim=-1),
        student_entropy=(student_sum - (student * student_mean).sum(dim=-1)).detach(),
    )


def softmax_over_memory(
    query: Tensor, memory: Tensor, filled: Tensor | int | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp of the logits `memory query`, and the mean row under their softmax.

    Args:
        query: `[B, d]`; nothing else receives a gradient, and only through the first output.
        memory: `[K, d]`, of any floating type.
        filled: number of leading rows that are scored; by default all.
        chunk: rows scored at a time; by default as many as make 4 million logits, 32 million on a GPU.

    Returns:
        `[B]` and `[B, d]`, both 0 if no row is scored.
    """
    size = rows_per_chunk(len(query), query.device, chunk)
    result: tuple[Tensor, Tensor] = _SoftmaxOverMemory.apply(
        query, memory, len(memory) if filled is None else filled, size
    )
    return result


def info_nce(logits: Tensor, positive: Tensor | None = None) -> Tensor:
    """Negative log probability of the positive among all keys (van den Oord, Li, Vinyals, 2018).

    Args:
        logits: `[B, M]`, similarities to M keys divided by a temperature.
        positive: int64 `[B]`, the column of each row's positive; by default the diagonal.

    Returns:
        `[B]`.
    """
    if positive is None:
        positive = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, positive, reduction="none")


def noise_contrast(
    logits: Tensor, normalizer: Tensor, samples: int, weight: Tensor | None = None, eps: float = 1e-7
) -> Tensor:
    """Noise-contrastive estimation: one data sample against K samples of uniform noise (Gutmann, Hyvärinen, 2010).

    Args:
        logits: `[B, 1 + K]`, the positive first.
        normalizer: scalar Z, the divisor of the exponentials.
        samples: number of samples from which the noise is drawn.
        weight: `[B, K]`, weights of the noise samples; by default 1.
        eps: added to the denominators, as in the public code of CRD.

    Returns:
        `[B]`.
    """
    noise = (logits.shape[1] - 1) / samples
    logits = logits - normalizer.log()
    total = (logits.exp() + (noise + eps)).log()
    negatives = total[:, 1:] - math.log(noise)
    if weight is not None:
        negatives = negatives * weight
    return total[:, 0] - logits[:, 0] + negatives.sum(dim=1)


class _SoftmaxOverMemory(torch.autograd.Function):
    """Streaming softmax over a memory; the gradient of the log sum is the mean row, the only tensor saved."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, memory: Tensor, filled: Tensor | int, chunk: int) -> tuple[Tensor, Tensor]:
        highest = query.new_full((len(query), 1), -math.inf)
        total = query.new_zeros(len(query), 1)
        mean = torch.zeros_like(query)
        for start in range(0, len(memory), chunk):
            rows = memory[start : start + chunk].to(query.dtype)
            logits = query @ rows.T
            logits.masked_fill_(torch.arange(start, start + len(rows), device=query.device) >= filled, -math.inf)
            before, highest = highest, torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            shift = highest.masked_fill(highest == -math.inf, 0.0)  # nothing filled so far
            shrink = (before - shift).exp()
            weights = logits.sub_(shift).exp_()
            total = total * shrink + weights.sum(dim=1, keepdim=True)
            mean = mean * shrink + weights @ rows
            del logits, weights  # before the next chunk is allocated
        empty = total == 0
        mean = mean / total.masked_fill(empty, 1.0)
        log_sum = (highest + total.log()).masked_fill(empty, 0.0).squeeze(1)
        ctx.save_for_backward(mean)
        ctx.mark_non_differentiable(mean)
        return log_sum, mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (mean,) = ctx.saved_tensors
        return gradients[0].unsqueeze(1) * mean, None, None, None
