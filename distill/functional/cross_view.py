"""Agreement of class probabilities within and across two views of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from distill.functional.logits import kd


class CRLDParts(NamedTuple):
    """Parts of CRLD before their weights, `[B]` each.

    Attributes:
        within: divergence between the networks in the same view, of both views.
        across: divergence between the networks in different views, of both pairs.
    """

    within: Tensor
    across: Tensor


def crld(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float | Tensor, confident: Sequence[Tensor]
) -> CRLDParts:
    """Cross-view consistency of predictions, where a teacher is confident: CRLD (Zhang, Liu, Cai, Ma, 2024).

    With k(a, b) = T^2 KL(teacher's b || student's a) of a sample, and s, t for the weak and s', t' for the strong view:

        within = confident[0] (k(s, t) + k(s', t'))
        across = confident[1] (k(s', t) + k(s, t'))

    Args:
        student: logits of the weak and of the strong view, `[B, K]` each.
        teacher: likewise.
        temperature: T.
        confident: whether a sample counts, 1 or 0, `[B]`: by the teacher's confidence in the weak and in the strong
            view.

    Returns:
        Both parts of each sample, `[B]`.
    """
    (weak, strong), (weak_target, strong_target) = student, teacher
    within = kd(weak, weak_target, temperature) + kd(strong, strong_target, temperature)
    across = kd(strong, weak_target, temperature) + kd(weak, strong_target, temperature)
    return CRLDParts(within * confident[0], across * confident[1])
