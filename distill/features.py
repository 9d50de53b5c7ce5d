"""Features of a network, their shapes, and taps that read layers by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from distill.errors import UserError, did_you_mean

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Features:
    """The features that a network computes for a batch.

    Attributes:
        logits: `[B, K]`, the class scores.
        embedding: `[B, d]`, the pooled input of the classifier.
        tokens: `[B, N, d]`, patch tokens without class or distillation tokens, or the cells of the last map,
            row by row.
        grid: `(h, w)` of the tokens, `h * w = N`.
        maps: output of each tapped layer, by tap name: a map `[B, d, h, w]`, tokens `[B, N, d]` or a vector `[B, d]`,
            whichever axes the layer itself gives.
        classify: the network's own classifier, embeddings `[..., d]` to logits `[..., K]`; `None` if it has none that
            computes its logits from its embedding alone. A student's weights get a gradient from it; a teacher's do
            not, but what it is called with does.
    """

    logits: Tensor | None = None
    embedding: Tensor | None = None
    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    classify: Callable[[Tensor], Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Return `logits`, `embedding`, `tokens`, or the map of the tap `name`.

        Raises:
            UserError: the network has no such feature.
        """
        tensor: Tensor = _lookup(self, name)
        return tensor

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the features with `function` applied to every tensor."""
        changed: dict[str, Any] = {
            name: function(value)
            for name in ("logits", "embedding", "tokens")
            if (value := getattr(self, name)) is not None
        }
        maps = {name: function(value) for name, value in self.maps.items()} if self.maps else self.maps
        return replace(self, **changed, maps=maps)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the features of several batches as those of one, whose rows are theirs one after the other."""
        first = parts[0]
        if len(parts) == 1:
            return first
        changed: dict[str, Any] = {
            item.name: torch.cat([getattr(part, item.name) for part in parts])
            for item in fields(first)
            if isinstance(getattr(first, item.name), Tensor)
        }
        maps = {name: torch.cat([part.maps[name] for part in parts]) for name in first.maps}
        return replace(first, **changed, maps=maps)


@dataclass(frozen=True)
class Summary(Features):
    """A teacher's features reduced to what one head compares; quantities that the head computes are among `maps`."""

    @classmethod
    def of(cls, features: Features, names: AbstractSet[str]) -> Summary:
        """Keep the named features, the grid of the tokens and the classifier."""
        kept = {name: getattr(features, name) for name in ("logits", "embedding", "tokens") if name in names}
        maps = {name: tensor for name, tensor in features.maps.items() if name in names}
        return cls(**kept, grid=features.grid, maps=maps, classify=features.classify)


@dataclass(frozen=True)
class FeatureSpec:
    """Shapes of `Features` without the batch dimension, known before step 0; `None` for missing features.

    Attributes:
        classifies: whether the features come with the network's own classifier, `Features.classify`.
    """

    logits: Shape | None = None
    embedding: Shape | None = None
    tokens: Shape | None = None
    grid: tuple[int, int] | None = None
    maps: Mapping[str, Shape] = field(default_factory=dict)
    classifies: bool = False

    @classmethod
    def of(cls, features: Features) -> FeatureSpec:
        """Return the shapes of given features."""

        def shape(tensor: Tensor | None) -> Shape | None:
            return None if tensor is None else tuple(tensor.shape[1:])

        return cls(
            logits=shape(features.logits),
            embedding=shape(features.embedding),
            tokens=shape(features.tokens),
            grid=features.grid,
            maps={name: tuple(tensor.shape[1:]) for name, tensor in features.maps.items()},
            classifies=features.classify is not None,
        )

    def __getitem__(self, name: str) -> Shape:
        """Return the shape of `logits` `(K,)`, `embedding` `(d,)`, `tokens` `(N, d)` or of a tapped map.

        Raises:
            UserError: the network has no such feature.
        """
        shape: Shape = _lookup(self, name)
        return shape


class Taps:
    """Read the outputs or inputs of named layers of any module while it runs.

    Create it before `torch.compile` and use it around the forward pass::

        taps = Taps(model, outputs={"last": "layer4"}, inputs={"embedding": "fc"})
        with taps as tensors:
            logits = model(image)
        tensors["last"], tensors["embedding"]

    For a layer that runs several times in a pass, the last output counts. A layer that is replaced (as SyncBatchNorm
    replaces BatchNorm) is still read under its name. Calls of a layer outside the pass are not read.

    Args:
        module: the network whose layers are read.
        outputs: tap name -> name of the layer in `module.named_modules()`.
        inputs: likewise, to read the first input of a layer instead of its output.

    Attributes:
        tensors: the tensors of the current pass, by tap name.

    Raises:
        UserError: a layer does not exist; the message lists near matches.
    """

    def __init__(
        self, module: nn.Module, outputs: Mapping[str, str] | None = None, inputs: Mapping[str, str] | None = None
    ) -> None:
        self.module = module
        self.tensors: dict[str, Tensor] = {}
        self.is_open = False
        self.tracks_versions = True
        self.hooks: list[_OutputHook | _InputHook] = []
        self.add(outputs or {}, inputs or {})

    def add(self, outputs: Mapping[str, str], inputs: Mapping[str, str] | None = None) -> None:
        """Read further layers.

        Args:
            outputs: tap name -> name of the layer.
            inputs: likewise, to read the first input of a layer instead of its output.

        Raises:
            UserError: a layer does not exist; the message lists near matches.
        """
        added: list[_OutputHook | _InputHook] = [
            *(_OutputHook(self, name, layer) for name, layer in outputs.items()),
            *(_InputHook(self, name, layer) for name, layer in (inputs or {}).items()),
        ]
        for hook in added:
            hook.attach()
        self.hooks += added

    def __enter__(self) -> dict[str, Tensor]:
        self.open()
        return self.tensors

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Begin a forward pass."""
        for hook in self.hooks:
            hook.attach()
        self.tensors = {}
        self.is_open = True

    def close(self) -> None:
        """End the forward pass and drop its tensors, so that no graph outlives the step."""
        self.tensors = {}
        self.is_open = False

    def protect(self) -> None:
        """From the next pass on, copy the tensors that were modified in place after being read (`ReLU(inplace=True)`).

        Call it at the end of a first pass, before `close`. In-place dropout writes only in train mode, which a pass
        in eval mode does not show: if the network has one, everything is copied.

        Raises:
            UserError: a layer took no part in the pass.
        """
        in_place_dropout = any(isinstance(layer, _DropoutNd) and layer.inplace for layer in self.module.modules())
        for hook in self.hooks:
            if hook.name not in self.tensors:
                raise UserError(f"layer {hook.layer!r} takes no part in the forward pass: tap another one")
            hook.copy = in_place_dropout or self.tensors[hook.name]._version != hook.version
        self.tracks_versions = False  # torch.compile cannot trace it


# The hooks are objects, not closures, so that a deep copy of a network writes to the copy's taps.
@dataclass(eq=False)
class _Hook(ABC):
    taps: Taps
    name: str
    layer: str
    attached: nn.Module | None = None
    copy: bool = False
    version: int = 0

    def attach(self) -> None:
        root = self.taps.module
        layer = root.get_submodule(self.layer) if self.attached is not None else find_layer(root, self.layer)
        if layer is not self.attached:
            self.register(layer)
            self.attached = layer

    @abstractmethod
    def register(self, layer: nn.Module) -> None:
        """Register the hook on the layer."""

    def record(self, tensor: Tensor) -> None:
        if self.taps.tracks_versions and not tensor.is_inference():  # an inference tensor has no version
            self.version = tensor._version  # the number of in-place writes so far
        self.taps.tensors[self.name] = tensor.clone() if self.copy else tensor


class _OutputHook(_Hook):
    def register(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self.taps.is_open:
            return
        if not isinstance(output, Tensor):
            raise UserError(
                f"layer {self.layer!r} returns {type(output).__name__}, not a tensor: tap a layer inside it"
            )
        self.record(output)


class _InputHook(_Hook):
    def register(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if self.taps.is_open and inputs and isinstance(inputs[0], Tensor):
            self.record(inputs[0])


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """Return the layer `name` of `module`.

    Raises:
        UserError: there is no such layer; the message lists near matches.
    """
    layers: dict[str, nn.Module] = dict(module.named_modules())
    if name not in layers or not name:
        raise UserError(f"no layer {name!r} in {type(module).__name__}: {did_you_mean(name, filter(None, layers))}")
    return layers[name]


def _lookup(source: Features | FeatureSpec, name: str) -> Any:
    if name in source.maps:
        return source.maps[name]
    features = {"logits": source.logits, "embedding": source.embedding, "tokens": source.tokens}
    if features.get(name) is None:
        known = [key for key, value in features.items() if value is not None] + list(source.maps)
        raise UserError(f"the network gives no {name!r}: {did_you_mean(name, known)}")
    return features[name]
