"""Figures of a validation or a test that compare the student with its teachers and need no labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from distill.distiller import Distiller
from distill.features import Features
from distill.heads import Batch, Head
from distill.metrics import NeighborAgreement
from distill.metrics.full_precision import FullPrecision
from distill.objective import TEACHER, Objective
from distill.schedules import Progress, Schedule
from distill.store import StoredTeacher

NEIGHBORS = "neighbor_agreement"
DISTILLATION = "distillation"


def neighbor_metrics(distiller: Distiller, stage: str) -> dict[str, MetricCollection]:
    """Create the neighbor agreement with each teacher that has an embedding, by the teacher's name.

    Args:
        distiller: with the student and the teachers.
        stage: `val` or `test`; with several teachers, each one's name follows it in the names of the metrics.
    """
    teachers: Any = distiller.teachers
    if distiller.student.spec.embedding is None:
        return {}
    only = list(teachers) == [TEACHER]
    return {
        name: MetricCollection({NEIGHBORS: NeighborAgreement()}, prefix=f"{stage}/" if only else f"{stage}/{name}/")
        for name, teacher in teachers.items()
        if teacher.gives("embedding", stage)
    }


def distillation_terms(objective: Objective) -> list[str]:
    """Return the terms of `val/distillation`: those that compare with a teacher image by image or within a batch.

    A relation over all ranks would depend on how the batches are dealt, and a memory belongs to the training.
    """
    return [name for name, term in objective.terms.items() if _is_compared(term.head)]


def distillation_is_scheduled(objective: Objective) -> bool:
    """Return True if the value of such a term changes with the progress of a training."""
    terms = [objective.terms[name] for name in distillation_terms(objective)]
    return any(isinstance(term.weight, Schedule) or term.head.is_scheduled for term in terms)


def distillation_is_known(distiller: Distiller, split: str) -> bool:
    """Return True if there are such terms, and a split's images have what they compare with: its rows, if stored."""
    teachers: Any = distiller.teachers
    terms = distillation_terms(distiller.objective)
    compared = [(name, teachers[distiller.objective.teacher_of(name)]) for name in terms]
    return bool(compared) and all(
        teacher.answers(name, split) for name, teacher in compared if isinstance(teacher, StoredTeacher)
    )


class DistillationMean(FullPrecision, MeanMetric):
    """Mean over the full batches of the weighted sum of terms that compare with a teacher."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")
        self._size = 0

    def add(
        self,
        objective: Objective,
        student: Features,
        teachers: Mapping[str, Features],
        batch: Batch,
        counted: Tensor,
        progress: Progress,
    ) -> None:
        """Add a batch; one in which an image is missing or does not count has the weight 0.

        Args:
            objective: with the terms.
            student: the student's features.
            teachers: the teachers' features, by name.
            batch: the batch.
            counted: mask `[B]` of the images that count.
            progress: training progress, for the schedules.
        """
        self._size = max(self._size, len(counted))
        if len(counted) < self._size:
            return
        total = torch.zeros((), device=counted.device)
        for name in distillation_terms(objective):
            term = objective.terms[name]
            teacher = objective.teacher_of(name)
            if teacher is None or not term.head.batch_needs <= batch.keys():
                continue
            term.head.progress = progress
            summary = objective.summary(name, teachers[teacher], batch)
            weight = term.weight_at(progress) * objective.factor(name)
            total = total + weight * term.head(student, summary, batch).detach()
        full = counted.all()
        self.update(torch.where(full, total.float(), 0.0), full.float())


def _is_compared(head: Head) -> bool:
    # Validation images have one view.
    return head.needs_teacher and head.scope in ("image", "batch") and "view" not in head.batch_needs
