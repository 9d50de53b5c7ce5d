"""Discriminative and consistent distillation (Giakoumoglou, Stathaki, 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distill.distributed import gather
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional.contrast import info_nce
from distill.functional.divergences import kl_divergence
from distill.heads.base import Batch, Head, Scope, positive
from distill.heads.parts.projection import NormalizedLinear


class DCD(Head):
    """Each image's student embedding finds its teacher embedding among all of the batch, and the other way round alike.

    With s = scale x cosine of the projected embeddings over the batch of all ranks: InfoNCE from student to teacher
    plus `consistency` x KL(teacher's choice of students || student's choice of teachers), mean over the images. Both
    projections and the scale are learned.

    The authors' code also learns a bias on all of s. Neither softmax sees it, its gradient is 0, and it is left out.

    Args:
        width: d of the projections.
        consistency: weight of the divergence.
        log_scale: what the logarithm of the scale starts with.
        max_scale: the scale's limit; beyond it the scale has no gradient.

    Raises:
        UserError: an argument out of its range.
    """

    needs = frozenset({"embedding"})
    scope: Scope = "global"
    student_projection: nn.Module
    teacher_projection: nn.Module

    def __init__(
        self, width: int = 128, consistency: float = 0.5, log_scale: float = 1.0, max_scale: float = 10.0
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"width must be at least 1, given {width}")
        positive("max_scale", max_scale)
        if log_scale >= math.log(max_scale):
            raise UserError(
                f"log_scale must be below the logarithm of max_scale, {math.log(max_scale):.4g}, or the scale is never "
                f"trained; given {log_scale}"
            )
        self.width = width
        self.consistency = consistency
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(float(log_scale)))

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Make the projections."""
        (student_width,), (teacher_width,) = student["embedding"], teacher["embedding"]
        self.student_projection = NormalizedLinear(student_width, self.width)
        self.teacher_projection = NormalizedLinear(teacher_width, self.width)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Contrast embeddings `[B, d_s]` with embeddings `[B, d_t]`."""
        anchors = gather(self.student_projection(student["embedding"]))
        keys = gather(self.teacher_projection(teacher["embedding"]))
        logits = anchors @ keys.T * self._scale().to(anchors.dtype)
        return (info_nce(logits) + self.consistency * kl_divergence(logits, logits.T)).mean()

    def diagnostics(self) -> dict[str, Tensor]:
        """The scale, which is one over the temperature."""
        return {"scale": self._scale().detach()}

    def _scale(self) -> Tensor:
        return self.log_scale.exp().clamp_max(self.max_scale)
