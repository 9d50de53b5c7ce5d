"""Discriminative and consistent distillation (Giakoumoglou, Stathaki, 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distill.distributed import gather, rows_of_this_rank
from distill.errors import UserError, require_above
from distill.features import Features
from distill.functional.contrast import info_nce
from distill.functional.divergences import kl_divergence
from distill.heads.base import Batch, RunInfo, Scope, require_several_images
from distill.heads.parts.embedding_head import EmbeddingHead


class DCD(EmbeddingHead):
    """In-batch contrast of student and teacher embeddings, with a consistency term between both directions.

    With s = scale x cosine of the projected embeddings over the batch of all ranks, the loss is InfoNCE from student to
    teacher plus `consistency` x KL(softmax of the teacher's row || softmax of the student's row), mean over the images.
    Both projections and the scale are learned.

    The authors' code also learns a bias added to all of s. It cancels in both softmaxes, its gradient is 0, and it is
    left out.

    All defaults are those of the authors' code.

    Args:
        width: d of the projections.
        consistency: weight of the divergence.
        log_scale: initial value of the logarithm of the scale.
        max_scale: upper limit of the scale; beyond it the scale has no gradient.

    Raises:
        UserError: an argument out of its range.
    """

    scope: Scope = "global"

    def __init__(
        self, width: int = 128, consistency: float = 0.5, log_scale: float = 1.0, max_scale: float = 10.0
    ) -> None:
        super().__init__(width)
        require_above(0, max_scale=max_scale)
        if log_scale >= math.log(max_scale):
            raise UserError(
                f"log_scale must be below the logarithm of max_scale, {math.log(max_scale):.4g}, or the scale is never "
                f"trained; given {log_scale}"
            )
        self.consistency = consistency
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(float(log_scale)))

    def prepare(self, run: RunInfo) -> None:
        """Check that there are images to compare with each other.

        Raises:
            UserError: a batch may have only one image.
        """
        super().prepare(run)
        require_several_images(self, run)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Contrast embeddings `[B, d_s]` with embeddings `[B, d_t]`."""
        anchors = gather(self.student_projection(student["embedding"]))
        keys = gather(self.teacher_projection(teacher["embedding"]))
        index, scale = rows_of_this_rank().index, self._scale().to(anchors.dtype)
        to_teacher, to_student = anchors[index] @ keys.T * scale, keys[index] @ anchors.T * scale
        positive = torch.arange(len(anchors), device=anchors.device)[index]
        return (info_nce(to_teacher, positive) + self.consistency * kl_divergence(to_teacher, to_student)).mean()

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the scale, the inverse of the temperature."""
        return {"scale": self._scale().detach()}

    def _scale(self) -> Tensor:
        return self.log_scale.exp().clamp_max(self.max_scale)
