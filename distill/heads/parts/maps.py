"""The base of losses that compare feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Head
from distill.heads.parts.map_reader import MapReader


class MapHead(Head):
    """A loss that compares maps of the same layers of both networks, layer by layer or all together.

    A layer has one name on both sides; a tap gives the name `mid` to, say, `layer2` of one network and `blocks.5` of
    the other (`taps: {mid: layer2}`). A head with an argument `teacher_of` can read other layers of the teacher. A
    pattern such as `stage*` stands for all taps whose names match it, in the order of the taps, so that one
    configuration serves networks of any depth.

    Args:
        of: the layers, shallow to deep, one name or several: `tokens`, `embedding`, names of taps or patterns of them.
        teacher_of: the teacher's layers, one for each of `of`; by default those of the same names.

    Attributes:
        of: the names of the layers; patterns are replaced by `check` and `build`.
        teacher_of: likewise of the teacher's layers.
        layers: for each layer, the student's and the teacher's reader.

    Raises:
        UserError: no layer is given, one is given twice, or the two lists differ in length.
    """

    of: list[str]
    teacher_of: list[str]
    layers: list[tuple[MapReader, MapReader]]

    def __init__(self, of: Sequence[str] | str, teacher_of: Sequence[str] | str | None = None) -> None:
        super().__init__()
        self._set_layers(_listed(of), _listed(of if teacher_of is None else teacher_of))

    def needs_of(self, side: Literal["student", "teacher"]) -> AbstractSet[str]:
        """Return the names of the layers of one network."""
        return frozenset(self.of if side == "student" else self.teacher_of)

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Replace patterns by the taps that match them, and check the layers against both networks.

        Raises:
            UserError: a network has no features of that name, or a pattern fits different taps.
        """
        if teacher is not None:
            self._set_layers(*matching_layers(self.of, self.teacher_of, student, teacher))
        super().check(student, teacher)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of each layer.

        Raises:
            UserError: a layer is neither a map nor a token grid nor a vector.
        """
        self._set_layers(*matching_layers(self.of, self.teacher_of, student, teacher))
        self.layers = [
            (MapReader(name, student, "student"), MapReader(teacher_name, teacher, "teacher"))
            for name, teacher_name in zip(self.of, self.teacher_of, strict=True)
        ]

    def maps(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Return the maps of each layer: the student's `[B, d_s, h, w]` and the teacher's `[B, d_t, h', w']`."""
        return [(read_student(student), read_teacher(teacher)) for read_student, read_teacher in self.layers]

    def require_cells(self) -> None:
        """Require at least two common cells per layer, since a comparison across one cell says nothing.

        Raises:
            UserError: the common grid of a layer has a single cell.
        """
        for student, teacher in self.layers:
            if min(student.grid[0], teacher.grid[0]) * min(student.grid[1], teacher.grid[1]) == 1:
                raise UserError(
                    f"{type(self).__name__} compares where a network is active, but {student.of!r} has "
                    f"{student.grid[0]} x {student.grid[1]} cells in the student and {teacher.grid[0]} x "
                    f"{teacher.grid[1]} in the teacher: name layers with at least 2 common cells"
                )

    def _set_layers(self, of: list[str], teacher_of: list[str]) -> None:
        for key, names in (("of", of), ("teacher_of", teacher_of)):
            if not names or len(set(names)) < len(names):
                raise UserError(f"{key} must name one or more layers, each once, given {names}")
        if len(of) != len(teacher_of):
            raise UserError(f"teacher_of must name as many layers as of, which is {of}, given {teacher_of}")
        self.of, self.teacher_of = of, teacher_of
        self.needs = frozenset(of) | frozenset(teacher_of)


def matching_layers(
    of: Sequence[str], teacher_of: Sequence[str], student: FeatureSpec, teacher: FeatureSpec
) -> tuple[list[str], list[str]]:
    """Return both networks' layers with each pattern (`stage*`) replaced by the taps that match it, in their order.

    Raises:
        UserError: a pattern matches no tap, or a pair of patterns matches different numbers of taps in student and
            teacher (different taps, if both are the same pattern).
    """
    student_layers: list[str] = []
    teacher_layers: list[str] = []
    for name, teacher_name in zip(of, teacher_of, strict=True):
        student_taps, teacher_taps = _matching(name, student), _matching(teacher_name, teacher)
        same = name == teacher_name
        if not student_taps or len(student_taps) != len(teacher_taps) or (same and student_taps != teacher_taps):
            fits = f"of {name!r} fits {', '.join(student_taps) or 'no tap'} of the student and "
            fits += "" if same else f"teacher_of {teacher_name!r} fits "
            fits += f"{', '.join(teacher_taps) or 'no tap'} of the teacher"
            raise UserError(f"{fits}: give both {'the same' if same else 'equally many'} taps")
        student_layers += student_taps
        teacher_layers += teacher_taps
    return student_layers, teacher_layers


def _matching(name: str, spec: FeatureSpec) -> list[str]:
    return [tap for tap in spec.maps if fnmatchcase(tap, name)] if "*" in name else [name]


def _listed(names: Sequence[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def total(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of the layers' losses, a scalar."""
    return torch.stack(list(losses)).sum()
