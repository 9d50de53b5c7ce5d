"""Divergences between corresponding quantities of student and teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def huber(student: Tensor, teacher: Tensor, present: Tensor | None = None, delta: float = 1.0) -> Tensor:
    """Mean Huber loss: half the squared difference up to `delta`, linear beyond.

    Args:
        student: any shape.
        teacher: the same shape.
        present: bool, broadcastable to that shape: the entries over which the mean runs, by default all; the mean over
            none is 0.
        delta: the largest difference with a squared loss.

    Returns:
        A scalar.
    """
    if present is None:
        return F.huber_loss(student, teacher, delta=delta)
    loss = F.huber_loss(student, teacher, delta=delta, reduction="none").masked_fill(~present, 0.0)
    return loss.sum() / present.expand_as(loss).sum().clamp_min(1)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(teacher || student) of the softened class distributions, computed from log probabilities.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        temperature: divisor of both logits.

    Returns:
        `[...]`, one value per sample, not multiplied by the squared temperature.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def probability_divergence(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Mean of p log((p + eps) / (q + eps)) over all entries, for the teacher's p and the student's q.

    Args:
        student: probabilities, any shape.
        teacher: probabilities, the same shape.
        eps: keeps the logarithm of 0 finite; 1e-7 as in the public code of PKT.

    Returns:
        A scalar.
    """
    return (teacher * ((teacher + eps) / (student + eps)).log()).mean()
