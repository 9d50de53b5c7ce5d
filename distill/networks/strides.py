"""Names of layers that mean the same in every network: by resolution, and by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from distill.errors import UserError
from distill.features import Shape
from distill.networks.layouts import axes_that_move
from distill.networks.passes import first_shapes, other_shapes

if TYPE_CHECKING:
    from distill.networks.base import Network

_NAME = re.compile(r"(stride|block)([1-9]\d*)")
_DEPTHS = (25, 50, 75, 100)
_LARGEST_STRIDE = 128
_MOST_PREFIX_TOKENS = 32
_PASSES = 2


@dataclass(frozen=True)
class StridedLayer:
    """A layer, and the stride of its output.

    Attributes:
        layer: its name.
        stride: pixels of the network's input per row and column.
        grid: `(h, w)` of the last tokens of a sequence; `None` for a map.
    """

    layer: str
    stride: int
    grid: tuple[int, int] | None = None


Size = tuple[int, int]
Seen = Sequence[tuple[Size, Shape]]
"""Shapes of an output by the size of the images; the first is that of the data."""


def resolve_taps(
    network: Network, image: Tensor, taps: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Replace `stride16` and `block50` by the layers that they name.

    Args:
        network: whose `taps` hold the layers that its pass reads.
        image: prepared images `[2, C, H, W]` of the size of the data.
        taps: tap name -> layer, `strideN` or `blockP`.

    Returns:
        Tap name -> layer; and the grids of the taps whose tokens are to be put back on it.

    Raises:
        UserError: the network has no layer of that stride, or no blocks of equal shape; the message lists what it has.
    """
    layers = dict(network.model.named_modules())
    wanted = {tap: match for tap, name in taps.items() if name not in layers and (match := _NAME.fullmatch(name))}
    resolved = dict(taps)
    grids: dict[str, tuple[int, int]] = {}
    if not wanted:
        return resolved, grids
    places = find_places(network, image)
    blocks = find_blocks(network.model, places)
    strides = last_of_each_stride(network.model, places)
    for tap, match in wanted.items():
        number = int(match[2])
        strided = strides.get(number) if match[1] == "stride" else _at_depth(blocks, number)
        if strided is None:
            offered = [f"stride{stride}" for stride in sorted(strides)]
            offered += [f"block{depth}" for depth in _DEPTHS] if blocks else []
            raise UserError(
                f"taps: {network.name!r} has no {match[0]!r} for images of {image.shape[-2]} x {image.shape[-1]}: it "
                f"has {', '.join(offered) or 'no layer of a known stride'}, and layers by name"
            )
        resolved[tap] = strided.layer
        if strided.grid is not None:
            grids[tap] = strided.grid
    return resolved, grids


def find_places(network: Network, image: Tensor) -> dict[str, StridedLayer | None]:
    """Find the strides of the outputs of all layers, in their order; `None` for those without.

    The tensors of a tuple, which cannot be tapped, are `name#0`, `name#1` and so on.
    """
    layers = {name: name for name, _ in network.model.named_modules() if name}
    first, runs = first_shapes(network, image, layers)
    seen: dict[str, list[tuple[Size, Shape]]] = {
        name: [((image.shape[-2], image.shape[-1]), shape)] for name, shape in first.items()
    }
    complete = 0
    for size, (shapes, finished) in other_shapes(network, image, layers, runs):
        for name in shapes.keys() & seen.keys():
            seen[name].append((size, shapes[name]))
        complete += finished
        if complete == _PASSES:
            break
    return {name: _place(name.partition("#")[0], shapes) for name, shapes in seen.items()}


def last_of_each_stride(model: nn.Module, places: Mapping[str, StridedLayer | None]) -> dict[int, StridedLayer]:
    """Return the last layer of each stride.

    A layer within a block whose own output has another stride, such as the first convolution of the next stage, comes
    last only if there is no other. A module with three strides or more is a whole network and no such block.
    """
    inside: dict[str, set[int]] = {}
    outputs: dict[str, set[int]] = {}
    for key, strided in places.items():
        outputs.setdefault(key.partition("#")[0], set()).update(() if strided is None else [strided.stride])
        if strided is not None:
            for name in _around(strided.layer):
                inside.setdefault(name, set()).add(strided.stride)

    def is_block(name: str, stride: int) -> bool:
        if name not in outputs or stride in outputs[name]:
            return False
        return not outputs[name] or len(inside[name]) < 3

    found: dict[int, tuple[int, StridedLayer]] = {}
    for key, strided in places.items():
        if strided is not None and "#" not in key and not isinstance(model.get_submodule(key), nn.Identity):
            depth = sum(is_block(name, strided.stride) for name in _around(strided.layer))
            if strided.stride not in found or depth <= found[strided.stride][0]:
                found[strided.stride] = depth, strided
    return {stride: strided for stride, (_, strided) in found.items()}


def _around(layer: str) -> list[str]:
    """Return the names of the modules that contain a layer."""
    parts = layer.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def find_blocks(model: nn.Module, places: Mapping[str, StridedLayer | None]) -> list[StridedLayer]:
    """Return the blocks of a network that consists of blocks of equal stride; none for other networks.

    They are the children of one list or sequence, hold most of the layers that have a stride, and are the only ones
    whose outputs are sequences, if these are.
    """
    found: list[StridedLayer] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        prefix = f"{name}." if name else ""
        children = [places.get(f"{prefix}{child}") for child, _ in module.named_children()]
        blocks = [strided for strided in children if strided is not None]
        if len(blocks) == len(children) > max(1, len(found)) and len({(b.stride, b.grid) for b in blocks}) == 1:
            found = blocks
    if not found:
        return []
    prefix = found[0].layer.rpartition(".")[0] + "."
    known = [strided for strided in places.values() if strided is not None]
    inside = [strided for strided in known if strided.layer.startswith(prefix)]
    plain = all(strided.stride == found[0].stride for strided in known if strided.grid is not None)
    return found if plain and len(inside) > 2 / 3 * len(known) else []


def _at_depth(blocks: Sequence[StridedLayer], percent: int) -> StridedLayer | None:
    return blocks[math.ceil(len(blocks) * percent / 100) - 1] if blocks and percent <= 100 else None


def _place(name: str, seen: Seen) -> StridedLayer | None:
    ranks = {len(shape) for _, shape in seen}
    if ranks == {4}:
        stride = _stride_of_map(seen)
        return None if stride is None else StridedLayer(name, stride)
    return _place_of_sequence(name, seen) if ranks == {3} else None


def _stride_of_map(seen: Seen) -> int | None:
    """Return the stride at which rows and columns grow with the images, or for one size, that fits it."""
    (size, shape), *others = seen
    grown: list[tuple[int, int]] = []  # pixels and cells
    for other_size, second_shape in others:
        axes = axes_that_move(shape, second_shape, (other_size[0] / size[0], other_size[1] / size[1]))
        if axes is None:
            return None
        for number, axis in enumerate(axes[2:]):
            grown.append((other_size[number] - size[number], second_shape[axis] - shape[axis]))
    if not others:
        fitting = [axes for axes in ((2, 3), (1, 2)) if _fitting_stride(size, [shape[axis] for axis in axes])]
        return _fitting_stride(size, [shape[axis] for axis in fitting[0]]) if fitting else None
    errors = {
        stride: sum(abs(cells - pixels / stride) for pixels, cells in grown)
        for stride in range(1, _LARGEST_STRIDE + 1)
        if all(cells > 0 and abs(cells - pixels / stride) < 1 for pixels, cells in grown)
    }
    return min(
        errors,
        key=lambda stride: (errors[stride] > 1e-6, stride & (stride - 1) != 0, errors[stride], stride),
        default=None,
    )


def _fitting_stride(size: Size, cells: Sequence[int]) -> int | None:
    """Return the stride that makes so many cells of one size, a power of two if possible."""
    fitting = [
        stride
        for stride in range(1, _LARGEST_STRIDE + 1)
        if any([rounded(side / stride) for side in size] == list(cells) for rounded in (math.floor, math.ceil))
    ]
    return (
        min(fitting, key=lambda stride: (stride & (stride - 1) != 0, stride), default=None) if max(cells) > 1 else None
    )


def _place_of_sequence(name: str, seen: Seen) -> StridedLayer | None:
    """Return the place of tokens that are a grid after a few others, the same ones for all sizes."""
    (size, shape), *others = seen
    axis = 1
    for other_size, second_shape in others:
        axes = axes_that_move(shape, second_shape, (other_size[0] / size[0], other_size[1] / size[1]))
        if axes is None or shape[axes[1]] == second_shape[axes[1]]:
            return None
        axis = axes[1]
    fitting: list[tuple[int, float, StridedLayer]] = []
    for stride in range(1, _LARGEST_STRIDE + 1):
        for rounded in _ROUNDINGS:
            grids = [(rounded(height / stride), rounded(width / stride)) for (height, width), _ in seen]
            rest = {tokens[axis] - grid[0] * grid[1] for (_, tokens), grid in zip(seen, grids, strict=True)}
            if grids[0][0] > 0 < grids[0][1] and len(rest) == 1 and 0 <= (prefix := rest.pop()) <= _MOST_PREFIX_TOKENS:
                error = sum(
                    abs(cells - side / stride)
                    for (sides, _), grid in zip(seen, grids, strict=True)
                    for cells, side in zip(grid, sides, strict=True)
                )
                fitting.append((prefix, error, StridedLayer(name, stride, grids[0])))
    return min(fitting, key=lambda found: (found[:2], found[2].stride))[2] if fitting else None


_ROUNDINGS = (math.floor, math.ceil, lambda cells: math.floor(cells) - 1)
"""Cells of a side by its length over the stride: padded down or up, or not padded."""
