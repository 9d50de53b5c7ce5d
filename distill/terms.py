"""A term of the loss: a head with its weight, its teacher and the views that it compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distill.errors import UserError
from distill.features import FeatureSpec
from distill.heads.base import Head, RunInfo
from distill.schedules import Progress, Schedule, value_at

TASK = "task"
"""Name of the term on the labels."""
TEACHER = "teacher"
"""Name given to a single, unnamed teacher."""

HalfOrFull = Literal["float32", "bfloat16", "float16"]


@dataclass
class Term:
    """A head with its weight in the total loss.

    Args:
        head: the loss.
        weight: a number, or a schedule over training. A head with the constant weight 0 is not built.
        teacher: name of the teacher that the head compares with; defaults to the only teacher.
        views: numbers, from 0, of the views of the student that the head gets, in this order; by default all, or view
            0 alone if the head keeps a memory. The batch that it gets has these rows alone, and numbers several views
            anew from 0.
        teacher_views: views of the teacher, one for each of the student's, or one for all of them; by default the same.
        summary_dtype: type that the teacher's summary is rounded to, before the head computes in float32; `bfloat16`
            and `float16` halve the size of a stored one.

    Raises:
        UserError: the views are not numbers from 0, each once.
    """

    head: Head
    weight: float | Schedule = 1.0
    teacher: str | None = None
    views: Sequence[int] | None = None
    teacher_views: Sequence[int] | None = None
    summary_dtype: HalfOrFull = "float32"

    def __post_init__(self) -> None:
        for key, views in (("views", self.views), ("teacher_views", self.teacher_views)):
            if views is not None and (not views or min(views) < 0):
                raise UserError(f"{key} must list numbers of views, from 0, given {list(views)}")
        if self.views is not None and len(set(self.views)) < len(self.views):
            raise UserError(f"views must list each view once, given {list(self.views)}")

    @property
    def is_off(self) -> bool:
        """True if the weight is the constant 0."""
        return not isinstance(self.weight, Schedule) and self.weight == 0

    def weight_at(self, progress: Progress) -> float:
        """Return the weight at `progress`."""
        return value_at(self.weight, progress)

    def views_of(self, count: int) -> Sequence[int]:
        """Return the student's views that the head gets of a batch with `count` views.

        Raises:
            UserError: there is no such view.
        """
        chosen = self.views
        if chosen is None:
            is_memory = self.head.scope == "memory" or self.head.filled() is not None
            chosen = [0] if is_memory else list(range(count))
        _require_known("views", chosen, count)
        return chosen

    def teacher_views_of(self, count: int) -> Sequence[int]:
        """Return the teacher's views, as many as the student's.

        Raises:
            UserError: there is no such view, or they are not as many.
        """
        student = self.views_of(count)
        if self.teacher_views is None:
            return student
        _require_known("teacher_views", self.teacher_views, count)
        if len(self.teacher_views) == 1:
            return [*self.teacher_views] * len(student)
        if len(self.teacher_views) != len(student):
            raise UserError(
                f"teacher_views must name one view, or one for each of the student's, which are {list(student)}, given "
                f"{list(self.teacher_views)}"
            )
        return self.teacher_views

    def require_comparable_views(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Require the same views of both networks if the head compares places in an image.

        Raises:
            UserError: they may differ, or there is no teacher.
        """
        if self.teacher_views is None or list(self.teacher_views) == list(self.views or ()):
            return
        kind = type(self.head).__name__
        if teacher is None or not self.head.needs_teacher:
            raise UserError(f"{kind} compares with no teacher: remove the term's teacher_views")
        named = [name for name in sorted(self.head.needs_of("student")) if len(student[name]) > 1]
        named += [name for name in sorted(self.head.needs_of("teacher")) if len(teacher[name]) > 1]
        named += [name for name in ("segments",) if name in self.head.batch_needs]
        if named:
            raise UserError(
                f"teacher_views is {list(self.teacher_views)}, but {kind} compares {named[0]!r}, whose places in an "
                "image are others in another view: leave teacher_views out"
            )

    def run_on_its_views(self, run: RunInfo) -> RunInfo:
        """Return the facts of a run as the head sees them, with the number of the views that it gets.

        Raises:
            UserError: the run has no such views.
        """
        if run.views is None:
            return run
        for key, views in (("views", self.views), ("teacher_views", self.teacher_views)):
            _require_known(key, views or (), run.views)
        self.teacher_views_of(run.views)
        count = len(self.views_of(run.views))
        return replace(run, views=count, provides=run.provides - ({"view"} if count == 1 else set()))


def key_of(name: str) -> str:
    """Return the configuration key of a term."""
    return "model.task" if name == TASK else f"model.heads.{name}"


def teacher_key(name: str) -> str:
    """Return the configuration key of a teacher."""
    return "model.teacher" if name == TEACHER else f"model.teachers.{name}"


def _require_known(key: str, views: Sequence[int], count: int) -> None:
    if views and max(views) >= count:
        known = "one view, 0" if count == 1 else f"{count} views, 0 to {count - 1}"
        raise UserError(f"{key} names view {max(views)}, but the data give {known}: see data.train_views")
