"""Losses between class logits, one value per sample, with finite values and gradients at any gap between logits."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.functional.divergences import kl_divergence


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Logit standardization (Sun et al. 2024): each sample's logits with mean 0 and standard deviation 1.

    z = (v - mean(v)) / (`eps` + sd(v)) with the unbiased sd, so that only the order and the proportions of the logits
    are left. If the logits of a sample are equal up to rounding, z is 0 with gradient 0; the public code has the same
    value there, but the gradient of z, 1 / `eps`.

    >>> standardize(torch.tensor([0.0, 4.0, 2.0]))
    tensor([-1.,  1.,  0.])

    Args:
        logits: `[..., K]`, K of 2 or more.
        eps: added to the standard deviation; 1e-7 as in the authors' code.

    Returns:
        `[..., K]`.
    """
    centered = logits - logits.mean(dim=-1, keepdim=True)
    noise = 4 * torch.finfo(logits.dtype).eps * torch.linalg.vector_norm(logits.detach(), dim=-1, keepdim=True)
    flat = torch.linalg.vector_norm(centered.detach(), dim=-1, keepdim=True) <= noise
    return centered / (logits.std(dim=-1, keepdim=True) + eps).masked_fill(flat, torch.inf)


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): T^2 KL(teacher || student) at temperature T.

    >>> kd(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor(0.)

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        temperature: T, a number or a scalar tensor; 4 as in the CRD benchmark.

    Returns:
        `[...]`.
    """
    return temperature**2 * kl_divergence(student_logits, teacher_logits, temperature)


def tckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """Target-class part of DKD: T^2 KL between the distributions over {target, any other class}.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        temperature: T.

    Returns:
        `[...]`.
    """
    student = _target_or_other(student_logits / temperature, target)
    teacher = _target_or_other(teacher_logits / temperature, target)
    return temperature**2 * kl_divergence(student, teacher)


def nckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """Non-target-class part of DKD: T^2 KL between the distributions over the classes other than the target.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        temperature: T.

    Returns:
        `[...]`.
    """
    return kd(_others(student_logits, target), _others(teacher_logits, target), temperature)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022): `alpha` TCKD + `beta` NCKD.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        alpha: weight of the target-class part.
        beta: weight of the other classes; the published values depend on the pair of networks; 8 is the most common.
        temperature: T.

    Returns:
        `[...]`.
    """
    target_part = tckd(student_logits, teacher_logits, target, temperature)
    return alpha * target_part + beta * nckd(student_logits, teacher_logits, target, temperature)


def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
    keep_target: bool = False,
) -> Tensor:
    """Normalized knowledge distillation (Yang et al. 2023): two cross-entropies, on the target and on all others.

    -p_t(y) log p_s(y) + `gamma` T^2 H, with p at temperature 1 and H = -sum_c q_t(c) log q_s(c) over the classes other
    than the target, whose probabilities at temperature T are normalized to q. Equal logits are the minimum, but its
    value is not 0.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        gamma: weight of the other classes; 1.5 as in the authors' code.
        temperature: T of the other classes; 1 as in the authors' code.
        keep_target: whether q ranges over all classes, as in the copy of NKD in SDD's public code.

    Returns:
        `[...]`.
    """
    student = student_logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    teacher = teacher_logits.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if not keep_target:
        student_logits, teacher_logits = _others(student_logits, target), _others(teacher_logits, target)
    others = (teacher_logits / temperature).softmax(-1) * (student_logits / temperature).log_softmax(-1)
    return -teacher * student - gamma * temperature**2 * others.sum(-1)


def scd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Sample confidence part of RLD: T^2 KL from {top class, rest} of the teacher to {target, rest} of the student.

    The teacher's top class counts even where it is not the target: only its confidence is passed on.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        temperature: T; 1 as in the authors' code.

    Returns:
        `[...]`.
    """
    student = _target_or_other(student_logits / temperature, target)
    teacher = _target_or_other(teacher_logits / temperature, teacher_logits.argmax(-1))
    return temperature**2 * kl_divergence(student, teacher)


def mcd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """Masked correlation part of RLD: T^2 KL among the classes to which the teacher gives less than to the target.

    The target, and every class that the teacher ranks as high or higher, is left out. A sample with no class left has
    value and gradient 0.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        temperature: T; 4 as in the authors' code.

    Returns:
        `[...]`.
    """
    masked = teacher_logits >= teacher_logits.gather(-1, target.unsqueeze(-1))
    lowest = torch.finfo(student_logits.dtype).min  # finite: with -inf a masked class would count 0 * inf
    student, teacher = (
        (logits / temperature).masked_fill(masked, lowest) for logits in (student_logits, teacher_logits)
    )
    return temperature**2 * kl_divergence(student, teacher)


def rld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    confidence_temperature: float | Tensor = 1.0,
) -> Tensor:
    """Refined logit distillation (Sun et al. 2025): `alpha` SCD + `beta` MCD.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: int64 `[...]`, the class of each sample.
        alpha: weight of the sample's confidence.
        beta: weight of the classes below the target.
        temperature: of MCD.
        confidence_temperature: of SCD.

    Returns:
        `[...]`.
    """
    confidence = scd(student_logits, teacher_logits, target, confidence_temperature)
    return alpha * confidence + beta * mcd(student_logits, teacher_logits, target, temperature)


def _others(logits: Tensor, target: Tensor) -> Tensor:
    """Return the logits `[..., K - 1]` of the classes other than the target."""
    target = target.unsqueeze(-1)
    classes = torch.arange(logits.shape[-1] - 1, device=logits.device).expand(*target.shape[:-1], -1)
    return logits.gather(-1, classes + (classes >= target))


def _target_or_other(logits: Tensor, target: Tensor) -> Tensor:
    """Return logits `[..., 2]` of the target and of any other class; unlike probabilities they do not saturate."""
    return torch.stack([logits.gather(-1, target.unsqueeze(-1)).squeeze(-1), _others(logits, target).logsumexp(-1)], -1)
