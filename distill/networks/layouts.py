"""The layouts of tapped layers: which axis of an output holds channels, rows, columns or tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn

from distill.errors import UserError, did_you_mean
from distill.features import Shape, find_layer
from distill.networks.passes import BATCH, OTHER_BATCH, first_shapes, other_shapes

if TYPE_CHECKING:
    from distill.networks.base import Network

Layout = Literal["NCHW", "NHWC", "NLC", "NCL"]
"""The axes of an output in order, in timm's letters: images N, channels C, rows H, columns W, tokens L."""

Axes = tuple[int, ...]
"""The axes of an output in the order of `Features`: `[B, d, h, w]` or `[B, N, d]`."""

_AXES: dict[str, Axes] = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 3, 1, 2), "NLC": (0, 1, 2), "NCL": (0, 2, 1)}

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
"""Layers of torch whose inputs and outputs have the channels in axis 1."""


def find_axes(network: Network, image: Tensor, layers: Mapping[str, str]) -> dict[str, Axes]:
    """Find the axes of the outputs of tapped layers.

    What a user says counts first; then which axes change with the height and width of the image; then what the family
    or torch's layers say of themselves. The passes run on a copy of the
    network whose tensors hold no data.

    Args:
        network: whose `taps` are in place.
        image: prepared images `[2, C, H, W]` of the size of the data.
        layers: tap name -> layer.

    Returns:
        For each output with three or four axes, by tap name, its axes in the order of `Features`.

    Raises:
        UserError: the axes of an output cannot be told, or are not the given ones, or its first axis is not the images.
    """
    for name in () if network.layout is None or isinstance(network.layout, str) else network.layout:
        if name not in layers:
            raise UserError(f"layout: there is no tap {name!r}: {did_you_mean(name, layers)}")
    if not layers:
        return {}
    size = (image.shape[-2], image.shape[-1])
    shapes, runs = first_shapes(network, image, layers)
    shapes = {name: shape for name, shape in shapes.items() if name in layers}
    for name, shape in shapes.items():
        if len(shape) > 1 and shape[0] != BATCH:
            raise UserError(
                f"taps: layer {layers[name]!r} gives {list(shape)} for {BATCH} images, so its first axis is not the "
                "images: tap another layer"
            )
    shapes = {name: shape for name, shape in shapes.items() if len(shape) in (3, 4)}
    found: dict[str, Axes] = {}
    for other_size, (moved, _) in other_shapes(network, image, {name: layers[name] for name in shapes}, runs):
        growth = other_size[0] / size[0], other_size[1] / size[1]
        for name in shapes.keys() & moved.keys() - found.keys():
            if (axes := axes_that_move(shapes[name], moved[name], growth)) is not None:
                found[name] = axes
        if found.keys() == shapes.keys():
            break
    said = network.declared_layouts(layers)
    stated: dict[str, Axes] | None = None
    for name, shape in shapes.items():
        if (given := _given(network, name, shape, found.get(name), layers[name])) is not None:
            found[name] = given
        if name not in found and len(said.get(name, "")) == len(shape):
            found[name] = _AXES[said[name]]
        if name not in found:
            stated = _stated(network, image, layers, shapes) if stated is None else stated
            if name not in stated:
                fitting = [layout for layout in get_args(Layout) if len(layout) == len(shape)]
                raise UserError(
                    f"taps: passes at other image sizes do not show the axes of {name!r}, {list(shape)} of layer "
                    f"{layers[name]!r}: give layout: {{{name}: {fitting[0]}}} or {fitting[1]}, or tap another layer"
                )
            found[name] = stated[name]
    return found


def axes_that_move(shape: Shape, second: Shape, growth: tuple[float, float]) -> Axes | None:
    """Return the axes of an output by the shapes that it has for images of two sizes, or `None` if these do not tell.

    Args:
        shape: for 2 images of the first size.
        second: for 3 images of the second size.
        growth: second height and width over the first.
    """
    if len(shape) != len(second) or (shape[0], second[0]) != (BATCH, OTHER_BATCH):
        return None
    axes = range(1, len(shape))
    moved = [axis for axis in axes if shape[axis] != second[axis]]
    single = [axis for axis in axes if shape[axis] == second[axis] == 1]
    fixed = [axis for axis in axes if axis not in moved and axis not in single]
    if len(fixed) > 1 or len(moved) > len(shape) - 2:
        return None
    if not fixed:  # of width 1, unless nothing moves
        fixed = [axis for axis in single[:1] if len(moved) == len(shape) - 2 or not moved]
        if not fixed:
            return None
    rest = [axis for axis in axes if axis != fixed[0]]
    if len(shape) == 3:
        return 0, rest[0], fixed[0]
    rows, columns = rest
    if len(moved) == 2:
        grown = [math.log(second[axis] / shape[axis]) for axis in rest]
        height, width = math.log(growth[0]), math.log(growth[1])
        in_order = abs(grown[0] - height) + abs(grown[1] - width)
        if abs(grown[1] - height) + abs(grown[0] - width) < in_order - 0.1:
            rows, columns = columns, rows
    return 0, fixed[0], rows, columns


def _given(network: Network, name: str, shape: Shape, found: Axes | None, layer: str) -> Axes | None:
    """Return the axes that the user gives: for this tap, or for all that the passes do not show."""
    if network.layout is None or isinstance(network.layout, str):
        fits = network.layout is not None and len(network.layout) == len(shape) and found is None
        return _AXES[str(network.layout)] if fits else None
    if (layout := network.layout.get(name)) is None:
        return None
    if len(layout) != len(shape):
        raise UserError(f"layout: {name!r} cannot be {layout}, layer {layer!r} gives {list(shape)}")
    channels = layout.index("C")
    if found is not None and math.prod(shape[1:]) != shape[channels] != 1 and channels != found[_channels(found)]:
        raise UserError(
            f"layout: {name!r} is not {layout}: in {list(shape)} of layer {layer!r}, axis {channels} changes with the "
            "size of the image"
        )
    return _AXES[layout]


def _channels(axes: Axes) -> int:
    """Return the position of the channels among the axes of `Features`."""
    return 1 if len(axes) == 4 else 2


def _stated(network: Network, image: Tensor, layers: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Axes]:
    """Return the axes of outputs that layers of torch give or read, since these say where the channels are."""
    found: dict[str, set[Axes]] = {
        name: {axes} for name in shapes if (axes := _axes_of(find_layer(network.model, layers[name]), shapes[name]))
    }

    def read(module: nn.Module, inputs: tuple[object, ...]) -> None:
        for name in shapes:
            tensor = network.taps.tensors.get(name)
            if tensor is not None and any(tensor is given for given in inputs) and (axes := _axes_of(module, tensor)):
                found.setdefault(name, set()).add(axes)

    handles = [module.register_forward_pre_hook(read) for module in network.model.modules()]
    try:
        with network.taps:
            network.run(image)
    finally:
        for handle in handles:
            handle.remove()
    return {name: next(iter(axes)) for name, axes in found.items() if len(axes) == 1}


def _axes_of(layer: nn.Module, output: Shape | Tensor) -> Axes | None:
    count = output.ndim if isinstance(output, Tensor) else len(output)
    if isinstance(layer, _CHANNELS_FIRST):
        return _AXES["NCHW" if count == 4 else "NCL"]
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and count == 3:
        return _AXES["NLC"]  # of four axes it says nothing about the first two, which may be windows and tokens
    return None
