"""A student, its teachers and their objective as one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.errors import under
from distill.features import Features
from distill.heads.base import Batch
from distill.networks import Network, Teacher
from distill.networks.teacher import teacher_features
from distill.objective import TEACHER, Losses, Objective, key_of
from distill.schedules import Progress
from distill.store import StoredTeacher
from distill.views import batch_of_views, require_views_of

ViewPasses = Literal["separate", "joint"]
"""How the student runs on several views of the images: once for each view, or once for all."""


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
        view_passes: whether the student runs once for each view of the images, `separate`, or once for all of them,
            `joint`; by default `separate` if it has BatchNorm, whose statistics are then those of one view. A teacher
            always runs once for each view.
    """

    def __init__(
        self,
        student: Network,
        teachers: Teacher | Mapping[str, Teacher] | None,
        objective: Objective,
        view_passes: ViewPasses | None = None,
    ) -> None:
        super().__init__()
        self.view_passes: ViewPasses = view_passes or default_view_passes(student)
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
        return self.objective(self.student_features(batch), teachers, batch, progress)  # type: ignore[no-any-return]

    def student_features(self, batch: Batch) -> Features:
        """Compute the student's features of a batch, view after view."""
        if self.view_passes == "joint":
            features: Features = self.student(batch["image"])
            return features
        return Features.joined([self.student(part["image"]) for part in self._views(batch)])

    def teacher_features(self, batch: Batch, names: Iterable[str]) -> dict[str, Features]:
        """Compute the features of the named teachers and of those that they are made of, by name, each once."""
        teachers: Any = self.teachers
        chosen = list(names)
        parts = [teacher_features(teachers, part, chosen) for part in self._views(batch)]
        return {name: type(first).joined([part[name] for part in parts]) for name, first in parts[0].items()}

    def _views(self, batch: Batch) -> list[Batch]:
        """Return the part of a batch that each view is."""
        if (views := self.objective.count_views(batch)) == 1:
            return [batch]
        require_views_of(batch, views)
        return [batch_of_views(batch, [view], views) for view in range(views)]


def default_view_passes(student: nn.Module) -> ViewPasses:
    """Return `separate` for a network with BatchNorm, else `joint`."""
    return "separate" if any(isinstance(layer, _BatchNorm) for layer in student.modules()) else "joint"
