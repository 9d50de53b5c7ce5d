"""Maps of layers, whichever features they are read from, and the pattern of a loss that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads.base import Head
from distill.heads.parts.grid_tokens import is_token_grid


class MapReader:
    """Reads one layer of one network as a map `[B, d, h, w]`.

    The layer is a tapped map, `tokens` or a tapped layer of a transformer (whose first tokens, as many as there are
    more than patches, are dropped), both put back on their grid, or a vector such as `embedding`, a map of one cell.

    Args:
        of: `tokens`, `embedding`, `logits` or the name of a tap.
        spec: the shapes of the network.
        side: `student` or `teacher`, for the sentences.

    Attributes:
        width: d.
        grid: `(h, w)`.

    Raises:
        UserError: the layer gives neither map nor token grid nor vector.
    """

    def __init__(self, of: str, spec: FeatureSpec, side: str) -> None:
        shape = spec[of]
        self.of = of
        self.width: int
        self.grid: tuple[int, int]
        if len(shape) == 3:
            self.width, self.grid = shape[0], (shape[1], shape[2])
        elif spec.grid is not None and is_token_grid(shape, spec.grid):
            self.width, self.grid = shape[1], spec.grid
        elif len(shape) == 1:
            self.width, self.grid = shape[0], (1, 1)
        else:
            raise UserError(
                f"{of!r} of the {side} has the shape {shape}: name 'tokens', 'embedding', or a layer that gives a map "
                "[d, h, w] or as many tokens as there are patches"
            )

    def __call__(self, features: Features) -> Tensor:
        found = features[self.of]
        if found.ndim == 4:
            return found
        if found.ndim == 2:
            return found[:, :, None, None]
        height, width = features.grid or self.grid
        return found[:, -height * width :].mT.reshape(len(found), -1, height, width)


class MapHead(Head):
    """A loss that compares maps of the same layers of both networks, layer by layer or all together.

    The layers have one name on both sides; a tap gives the name `parts` to `layer2` of one network, say, and to
    `blocks.5` of the other (`taps: {parts: layer2}`). A pattern such as `stage*` stands for all taps of such names, in
    the order of the taps, so that one configuration serves networks of any depth.

    Args:
        of: the layers, shallow to deep, one name or several: `tokens`, `embedding`, names of taps or patterns of them.

    Attributes:
        of: their names; what patterns stand for is known after `check` or `build`.
        layers: what reads them, a pair of the student's and the teacher's for each layer.

    Raises:
        UserError: no layer is given, or one twice.
    """

    of: list[str]
    layers: list[tuple[MapReader, MapReader]]

    def __init__(self, of: Sequence[str] | str) -> None:
        super().__init__()
        self._name_layers([of] if isinstance(of, str) else list(of))

    def check(self, student: FeatureSpec, teacher: FeatureSpec | None) -> None:
        """Find the layers that patterns stand for, and hold `needs` against what the networks give.

        Raises:
            UserError: a network gives no features of that name.
        """
        if teacher is not None:
            self._name_layers(layers_named(self.of, student, teacher))
        super().check(student, teacher)

    def build(self, student: FeatureSpec, teacher: FeatureSpec) -> None:
        """Find out which layers are read, and how.

        Raises:
            UserError: a layer gives neither map nor token grid nor vector.
        """
        self._name_layers(layers_named(self.of, student, teacher))
        self.layers = [(MapReader(name, student, "student"), MapReader(name, teacher, "teacher")) for name in self.of]

    def maps(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """The maps of each layer: the student's `[B, d_s, h, w]` and the teacher's `[B, d_t, h', w']`."""
        return [(own(student), other(teacher)) for own, other in self.layers]

    def _name_layers(self, names: list[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise UserError(f"of must name one or more layers, each once, given {names}")
        self.of = names
        self.needs = frozenset(names)

    def require_cells(self) -> None:
        """Hold the grids against a comparison of attention maps, in which a single cell is always 1.

        Raises:
            UserError: both networks have but one cell of a layer in common.
        """
        for own, other in self.layers:
            if min(own.grid[0], other.grid[0]) * min(own.grid[1], other.grid[1]) == 1:
                raise UserError(
                    f"{type(self).__name__} compares where a network is active, but {own.of!r} has "
                    f"{own.grid[0]} x {own.grid[1]} cells in the student and {other.grid[0]} x {other.grid[1]} in the "
                    "teacher: name layers with 2 cells or more"
                )


def layers_named(names: Sequence[str], student: FeatureSpec, teacher: FeatureSpec) -> list[str]:
    """The names with each pattern (`stage*`) replaced by the taps that it fits, in their order.

    Raises:
        UserError: a pattern fits no tap, or others in the student than in the teacher.
    """
    found: list[str] = []
    for name in names:
        if "*" not in name:
            found.append(name)
            continue
        own, other = ([tap for tap in spec.maps if fnmatchcase(tap, name)] for spec in (student, teacher))
        if not own or own != other:
            shown = (", ".join(taps) or "no tap" for taps in (own, other))
            raise UserError(
                "of {!r} fits {} of the student and {} of the teacher: give both the same taps".format(name, *shown)
            )
        found += own
    return found


def total(losses: Sequence[Tensor]) -> Tensor:
    """The sum of the losses of the layers, a scalar."""
    return torch.stack(list(losses)).sum()
