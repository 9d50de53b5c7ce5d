"""Optimal transport between class distributions, and the costs of moving mass between classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cka(x: Tensor, present: Tensor | None = None) -> Tensor:
    """Linear centered kernel alignment of the features of all pairs of classes.

    `|X_j^T X_i|^2 / (|X_i^T X_i| |X_j^T X_j|)`, Frobenius norms, of features centered over the samples of the class.
    Sample r of one class is paired with sample r of the other, so the value depends on the order of the samples.

    Args:
        x: `[K, n, d]`, n samples of each of K classes.
        present: bool `[K, n]`, the samples that there are, by default all; the others are paired with nothing.

    Returns:
        `[K, K]`, between 0 and 1; 0 for a class whose features are all equal.
    """
    if present is None:
        x = x - x.mean(dim=1, keepdim=True)
    else:
        there = present.unsqueeze(2).to(x.dtype)
        x = there * (x - (there * x).sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True).clamp_min(1))
    gram = F.normalize((x @ x.mT).flatten(1), dim=1)  # |X_j^T X_i|^2 is the product of the samples' Gram matrices
    return gram @ gram.mT


def class_costs(similarity: Tensor, sharpness: float = 1.0) -> Tensor:
    """Return the cost of moving mass between classes, `1 - exp(-k (1 - similarity))`, or `1 - similarity` if k is 0.

    Args:
        similarity: of all pairs of classes, `[K, K]`, at most 1.
        sharpness: k; 1 as in the authors' code of WKD.

    Returns:
        `[K, K]`, 0 on the diagonal.
    """
    distance = 1 - similarity
    cost = -torch.expm1(-sharpness * distance) if sharpness else distance
    return cost.masked_fill(torch.eye(len(cost), dtype=torch.bool, device=cost.device), 0.0)


def class_cosines(weight: Tensor) -> Tensor:
    """Return the cosines of the rows of a classifier's weight `[K, d]`: `[K, K]`."""
    weight = F.normalize(weight, dim=1)
    return weight @ weight.mT


def transport_among_others(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    cost: Tensor,
    temperature: float = 1.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """Entropic transport cost between both networks' distributions over the classes other than the target.

    Sinkhorn's iterations with the kernel `exp(-c / regularization)`, c = max(cost, 0) + 1e-8, start from equal row
    scales and end with the rows, so that the plan's rows sum to the student's probabilities, and its columns only
    nearly to the teacher's. The gradient runs through all iterations. The target has no mass, so one kernel `[K, K]`
    serves all samples.

    Args:
        student_logits: `[B, K]`.
        teacher_logits: `[B, K]`.
        target: int64 `[B]`.
        cost: `[K, K]`.
        temperature: T of both distributions.
        regularization: divisor of the costs in the kernel; 0.05 as in the authors' code of WKD.
        iterations: 10, likewise.

    Returns:
        `[B]`.
    """
    classes = student_logits.shape[-1]
    is_target = target.unsqueeze(-1) == torch.arange(classes, device=target.device)
    source, goal = (
        (logits / temperature).masked_fill(is_target, -math.inf).softmax(dim=-1)
        for logits in (student_logits, teacher_logits)
    )
    cost = cost.clamp_min(0) + 1e-8
    kernel = (-cost / regularization).exp()
    rows = (~is_target).to(source.dtype) / (classes - 1)
    columns = rows
    for _ in range(iterations):
        columns = goal / (rows @ kernel + 1e-8)
        rows = source / (columns @ kernel.mT + 1e-8)
    return (rows @ (kernel * cost) * columns).sum(dim=-1)


def target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the target class, weighted by the teacher's probability: `-p_t(y) log p_s(y)`, at temperature 1.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        target: y, int64 `[...]`.

    Returns:
        `[...]`.
    """
    target = target.unsqueeze(-1)
    student, teacher = (logits.log_softmax(dim=-1).gather(-1, target) for logits in (student_logits, teacher_logits))
    return -(teacher.exp() * student).squeeze(-1)
