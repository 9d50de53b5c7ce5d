"""A student, its teachers and their objective as one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from distill.errors import under
from distill.features import Features
from distill.heads.base import Batch
from distill.networks import Network, Teacher
from distill.networks.teacher import teacher_features
from distill.objective import TEACHER, Losses, Objective, key_of
from distill.schedules import Progress
from distill.store import StoredTeacher


class Distiller(nn.Module):
    """A student, its teachers and their objective as one module that any training loop can wrap in DDP.

    `distiller.parameters()` contains everything trainable: the student's weights and the heads' projections. The
    teachers' parameters are hidden from the module::

        optimizer = SGD(distiller.parameters(), lr=0.1)
        for step, batch in enumerate(loader):
            loss = distiller(batch, Progress(step)).total
            loss.backward()
            ...

    Args:
        student: a built network.
        teachers: a teacher, or several by name; `None` without a teacher.
        objective: an objective built for the shapes of these networks.
    """

    def __init__(
        self, student: Network, teachers: Teacher | Mapping[str, Teacher] | None, objective: Objective
    ) -> None:
        super().__init__()
        self.student = student
        named = {TEACHER: teachers} if isinstance(teachers, Teacher) else dict(teachers or {})
        self.teachers = nn.ModuleDict(named)
        self.objective = objective
        for name, teacher in named.items():
            if isinstance(teacher, StoredTeacher):
                teacher.use(name, objective.requests(name))
                for term in teacher.requests:
                    with under(key_of(term)):
                        teacher.require(term)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """Compute the losses of a batch; the teachers that are read at this step run first, without gradient."""
        teachers = self.teacher_features(batch, self.objective.active(progress))
        return self.objective(self.student(batch["image"]), teachers, batch, progress)  # type: ignore[no-any-return]

    def teacher_features(self, batch: Batch, names: Iterable[str]) -> dict[str, Features]:
        """Compute the features of the named teachers and of those that they are made of, by name, each once."""
        teachers: Any = self.teachers
        return teacher_features(teachers, batch, names)
