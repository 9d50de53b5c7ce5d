"""Agreement of class probabilities at the levels of a sample, a class and a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.distributed import ALL_ROWS, Rows
from distill.functional.logits import kd
from distill.functional.logits import standardize as standardized

Masks = Literal["scale", "rows"]
TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)
"""Temperatures of MLKD's public code; the second view is compared at the first three."""


class MLKDParts(NamedTuple):
    """Parts of MLKD, scalars whose sum is the loss.

    Attributes:
        instances: divergence of each sample's classes.
        classes: difference of the Gram matrices among classes.
        batch: difference of the Gram matrices among samples.
    """

    instances: Tensor
    classes: Tensor
    batch: Tensor


def mlkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    view: Tensor | None = None,
    temperatures: Sequence[float | Tensor] = TEMPERATURES,
    standardize: bool = False,
    masks: Masks = "scale",
    rows: Rows = ALL_ROWS,
) -> MLKDParts:
    """Multi-level logit distillation (Jin, Wang, Lin, 2023).

    With P the class probabilities `[B, K]` at temperature T and P' their transpose, the parts are

        instances = m   sum_T  1/B sum_n T^2 KL(teacher || student)
        classes   = m_c sum_T  1/K |P_t' P_t - P_s' P_s|^2
        batch     = m   sum_T  1/B |P_t P_t' - P_s P_s'|^2

    m is the share of samples whose largest teacher probability is at most the median of the batch, m_c the share of
    classes whose teacher probabilities, summed over the batch, are at most the median of the classes (both at
    temperature 1, with interpolated medians). With distinct values m is 1/2 for an even B, (B + 1) / 2B for an odd one.

    Rows of a second view (`view` above 0) enter as in the public code: instances gains their mean divergence at the
    first three temperatures, and once more the first view's at the others, both without m. All else is of the first
    view, and of the first view alone where there is no second.

    Args:
        student_logits: `[B, K]`.
        teacher_logits: `[B, K]`.
        view: int64 `[B]`, the view that each row shows; by default all show view 0.
        temperatures: T; the public code's by default.
        standardize: whether the divergences compare standardized logits; masks and Gram matrices never do.
        masks: with `scale`, as in the public code, masks only scale a part by m or m_c. With `rows` they select: the
            divergences of the selected samples are summed and divided by B, and of the squared differences between
            Gram matrices the columns of the selected classes and samples count, divided by K^2 and B^2 besides.
        rows: the samples whose rows of the Gram matrix this rank computes; by default all.

    Returns:
        Three scalars; with `rows`, the last is this rank's share.
    """
    samples, classes, count = _masks(teacher_logits, view)
    first = torch.ones_like(samples) if view is None else (view == 0).to(samples)
    entries = (1, 1) if masks == "scale" else (student_logits.shape[-1] ** 2, count**2)
    if masks == "scale":
        samples, classes = first * (samples.sum() / count), classes.mean()
    compared = [standardized(logits) if standardize else logits for logits in (student_logits, teacher_logits)]
    divergences = torch.stack([kd(compared[0], compared[1], temperature) for temperature in temperatures])
    by_class, by_sample = [], []
    for temperature in temperatures:
        student, teacher = (
            (logits / temperature).softmax(-1) * first.unsqueeze(-1) for logits in (student_logits, teacher_logits)
        )
        by_class.append(((teacher.mT @ teacher - student.mT @ student).square() * classes).sum())
        products = [part[rows.index] @ part.mT for part in (teacher, student)]
        by_sample.append(((products[0] - products[1]).square() * samples).sum())
    instances = (divergences * samples).sum() / count
    if view is not None:
        second = view > 0
        instances = instances + (divergences[:3] * second).sum() / second.sum().clamp_min(1)
        instances = instances + second.any() * (divergences[3:] * first).sum() / count
    return MLKDParts(
        instances,
        torch.stack(by_class).sum() / student_logits.shape[-1] / entries[0],
        rows.ranks * torch.stack(by_sample).sum() / count / entries[1],
    )


def _masks(teacher_logits: Tensor, view: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return MLKD's masks of the first view's samples `[B]` and of the classes `[K]`, and the number of samples."""
    probability = teacher_logits.softmax(-1)
    confidence = probability.amax(-1)
    if view is not None:  # NaN: ignored by the median and below nothing
        confidence = confidence.masked_fill(view != 0, torch.nan)
        probability = probability * (view == 0).unsqueeze(-1)
    samples = confidence <= confidence.nanmedian()  # as many are at most the lower of two medians as at most their mean
    mass = probability.sum(0)
    classes = mass <= mass.median()
    return samples.to(teacher_logits), classes.to(teacher_logits), confidence.isfinite().sum()
