"""The shapes that the layers of a network give for images of several sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from distill.features import Shape, find_layer

if TYPE_CHECKING:
    from distill.networks.base import Network

BATCH = 2
"""Images of the first pass."""
OTHER_BATCH = 3
"""Images of the passes at other sizes."""


class Pass(NamedTuple):
    """A pass over images.

    Attributes:
        shapes: name -> shape of each output that it reached, in the order in which they appeared. The tensors of a
            tuple are `name#0`, `name#1` and so on.
        finished: whether it came to its end.
    """

    shapes: dict[str, Shape]
    finished: bool


Run = Callable[[int, tuple[int, int]], Pass]
"""A pass over as many images of a size."""


def first_shapes(network: Network, image: Tensor, layers: Mapping[str, str]) -> tuple[dict[str, Shape], list[Run]]:
    """Return the shapes at the size of the data, and functions that run passes at other sizes.

    Args:
        network: whose `taps` hold the layers that its pass reads.
        image: prepared images `[2, C, H, W]` of the size of the data.
        layers: name -> layer.
    """
    runs: list[Run] = []
    shapes: dict[str, Shape] = {}
    finished = False
    if (without_data := _run_without_data(network, image, layers)) is not None:
        runs.append(without_data)
        shapes, finished = without_data(BATCH, (image.shape[-2], image.shape[-1]))
    if not finished and shapes.keys() != layers.keys():  # an operation that needs data
        shapes = {}
        handles = _record(network.model, layers, shapes)
        try:
            with network.taps:
                network.run(image)
        finally:
            for handle in handles:
                handle.remove()
        runs.append(_run_with_data(network, image, layers))
    return shapes, runs


def other_shapes(
    network: Network, image: Tensor, layers: Mapping[str, str], runs: list[Run]
) -> Iterator[tuple[tuple[int, int], Pass]]:
    """Yield sizes and shapes of passes at other sizes, as far as they get, then of models made for other sizes."""
    if not layers:
        return
    sizes = other_sizes(image.shape[-2], image.shape[-1])
    for run in [*runs, _run_of_another_model(image, layers, network.model_for_size)]:
        for size in sizes:
            yield size, run(OTHER_BATCH, size)


def other_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return sizes of images that show the axes of an output, the most telling first.

    Most networks take sizes that are larger by multiples of 64. Doubled sizes suit all patches and windows, and some
    networks take square images only. Height and width grow by different factors, to tell rows from columns.
    """
    steps = next(steps for steps in range(2, 99) if abs(math.log((1 + 64 / height) / (1 + 64 * steps / width))) > 0.2)
    return [(height + 64, width + 64 * steps), (2 * height, 3 * width), (2 * height, 2 * width)]


def _run_without_data(network: Network, image: Tensor, layers: Mapping[str, str]) -> Run | None:
    """Return a function that runs a copy of the network whose tensors have shapes but no data."""
    try:
        memo: dict[int, object] = {}
        for module in network.modules():
            values = list(vars(module).values())
            inside = [item for value in values if isinstance(value, dict) for item in value.values()]
            tensors = (value for value in (*values, *inside) if isinstance(value, Tensor))
            memo |= {id(tensor): tensor.detach().to("meta") for tensor in tensors}
        copied = copy.deepcopy(network, memo)
    except Exception:  # what cannot be copied
        return None

    def run(batch: int, size: tuple[int, int]) -> Pass:
        with torch.device("meta"):
            images = torch.empty(batch, image.shape[1], *size, dtype=image.dtype)
            return _shapes(copied.model, copied.taps, copied.run, images, layers)

    return run


def _run_with_data(network: Network, image: Tensor, layers: Mapping[str, str]) -> Run:
    try:
        copied = copy.deepcopy(network)
    except Exception:
        copied = network

    def run(batch: int, size: tuple[int, int]) -> Pass:
        images = image.new_zeros(batch, image.shape[1], *size)
        return _shapes(copied.model, copied.taps, copied.run, images, layers)

    return run


def _run_of_another_model(image: Tensor, layers: Mapping[str, str], make: Callable[..., nn.Module | None]) -> Run:
    """Return a function that runs a model made for another size, if the family can make one."""

    def run(batch: int, size: tuple[int, int]) -> Pass:
        random_state = torch.get_rng_state()
        try:
            with torch.device("meta"):
                model = make(size)
                if model is None:
                    return Pass({}, finished=False)
                images = torch.empty(batch, image.shape[1], *size)
                return _shapes(model.eval(), nullcontext(), model, images, layers)
        finally:
            torch.set_rng_state(random_state)

    return run


def _shapes(
    model: nn.Module,
    taps: AbstractContextManager[object],
    run: Callable[[Tensor], object],
    image: Tensor,
    layers: Mapping[str, str],
) -> Pass:
    """Return the shapes of the outputs that a pass reaches before it ends or fails."""
    found: dict[str, Shape] = {}
    finished = False
    handles = _record(model, layers, found)
    with torch.no_grad(), taps, suppress(Exception):  # of a network for one size; what was recorded before counts
        run(image)
        finished = True
    for handle in handles:
        handle.remove()
    return Pass(found, finished)


def _record(
    model: nn.Module, layers: Mapping[str, str], found: dict[str, Shape]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Record the shape of the last output of each layer, in the order in which they appear."""

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, inputs: object, output: object) -> None:
            tensors: tuple[object, ...] = output if isinstance(output, tuple) else (output,)
            for number, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor):
                    key = f"{name}#{number}" if tensors is output else name
                    found.pop(key, None)
                    found[key] = tuple(map(int, tensor.shape))

        return record

    return [find_layer(model, layer).register_forward_hook(hook(name)) for name, layer in layers.items()]
