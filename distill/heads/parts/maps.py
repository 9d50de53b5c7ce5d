"""The base of losses that compare feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Head
from distill.heads.parts.map_reader import MapReader


class MapHead(Head):
    """A loss that compares maps of the same layers of both networks, layer by layer or all together.

    A layer has one name on both sides; a tap gives the name `mid` to, say, `layer2` of one network and `blocks.5` of
    the other (`taps: {mid: layer2}`). A pattern such as `stage*` stands for all taps whose names match it, in the order
    of the taps, so that one configuration serves networks of any depth.

    Args:
        of: the layers, shallow to deep, one name or several: `tokens`, `embedding`, names of taps or patterns of them.

    Attributes:
        of: the names of the layers; patterns are replaced by `check` and `build`.
        layers: for each layer, the student's and the teacher's reader.

    Raises:
        UserError: no layer is given, or one is given twice.
    """

    of: list[str]
    layers: list[tuple[MapReader, MapReader]]

    def __init__(self, of: Sequence[str] | str) -> None:
        super().__init__()
        self._set_layers([of] if isinstance(of, str) else list(of))

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Replace patterns by the taps that match them, and check `needs` against both networks.

        Raises:
            UserError: a network has no features of that name.
        """
        if teacher is not None:
            self._set_layers(matching_layers(self.of, student, teacher))
        super().check(student, teacher)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Build the readers of each layer.

        Raises:
            UserError: a layer is neither a map nor a token grid nor a vector.
        """
        self._set_layers(matching_layers(self.of, student, teacher))
        self.layers = [(MapReader(name, student, "student"), MapReader(name, teacher, "teacher")) for name in self.of]

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

    def _set_layers(self, names: list[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise UserError(f"of must name one or more layers, each once, given {names}")
        self.of = names
        self.needs = frozenset(names)


def matching_layers(names: Sequence[str], student: FeatureSpec, teacher: FeatureSpec) -> list[str]:
    """Return the names with each pattern (`stage*`) replaced by the taps that match it, in their order.

    Raises:
        UserError: a pattern matches no tap, or different taps in the student and in the teacher.
    """
    layers: list[str] = []
    for name in names:
        if "*" not in name:
            layers.append(name)
            continue
        student_taps, teacher_taps = (
            [tap for tap in spec.maps if fnmatchcase(tap, name)] for spec in (student, teacher)
        )
        if not student_taps or student_taps != teacher_taps:
            listed = (", ".join(taps) or "no tap" for taps in (student_taps, teacher_taps))
            raise UserError(
                "of {!r} fits {} of the student and {} of the teacher: give both the same taps".format(name, *listed)
            )
        layers += student_taps
    return layers


def total(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of the layers' losses, a scalar."""
    return torch.stack(list(losses)).sum()
