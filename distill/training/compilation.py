"""Compilation of networks and heads in place."""

from __future__ import annotations

from typing import Any, Literal

from distill.distiller import Distiller
from distill.errors import UserError
from distill.networks import FrozenTeacher

Compiled = Literal["none", "student", "teacher", "both", "all"]


def compile_parts(distiller: Distiller, which: Compiled, **options: Any) -> None:
    """Compile in place, so that the names in checkpoints stay the same; compilation runs in the first pass.

    Args:
        distiller: student, teachers and objective.
        which: the network of the `student`, those of the `teacher`, `both`, or `all`: the networks that there are, and
            the heads that are pure functions.
        options: arguments of `torch.compile`.

    Raises:
        UserError: the teacher's network is to be compiled, and there is none.
    """
    teachers: Any = distiller.teachers
    networks = [teacher.network for teacher in teachers.values() if isinstance(teacher, FrozenTeacher)]
    if which in ("teacher", "both") and not networks:
        reason = "the teacher is stored, so that no network runs" if len(teachers) else "there is no teacher"
        raise UserError(f"model.compile is {which!r}, but {reason}")
    if which in ("student", "both", "all"):
        distiller.student.compile(**options)
    for network in networks if which in ("teacher", "both", "all") else ():
        network.compile(**options)
    for term in distiller.objective.terms.values() if which == "all" else ():
        if term.head.is_pure:
            term.head.compile(**options)
