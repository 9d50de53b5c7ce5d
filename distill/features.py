"""What a network saw, the shapes of it, and the tapping of layers by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from distill.errors import UserError, did_you_mean

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Features:
    """What a network saw of a batch.

    Attributes:
        logits: `[B, K]`, the class scores.
        embedding: `[B, d]`, pooled, what the classifier read.
        tokens: `[B, N, d]`, patch tokens without class or distillation tokens, or the cells of the last map,
            row by row.
        grid: `(h, w)` of the tokens, `h * w = N`.
        maps: output of each tapped layer, by the name of its tap.
    """

    logits: Tensor | None = None
    embedding: Tensor | None = None
    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `logits`, `embedding` or `tokens`, or the map of a tap of that name.

        Raises:
            UserError: the network has none of that name.
        """
        found: Tensor = _lookup(self, name)
        return found

    def apply(self, function: Callable[[Tensor], Tensor]) -> Features:
        """The same features with `function` applied to every tensor."""
        changed: dict[str, Any] = {
            item.name: function(value) for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **changed, maps={name: function(value) for name, value in self.maps.items()})


@dataclass(frozen=True)
class Summary(Features):
    """A teacher's features, reduced to what one head compares; its own quantities stand among the `maps`."""

    @classmethod
    def of(cls, features: Features, names: AbstractSet[str]) -> Summary:
        """Keep the features of these names, and the grid that tokens lie on."""
        kept = {name: getattr(features, name) for name in ("logits", "embedding", "tokens") if name in names}
        maps = {name: tensor for name, tensor in features.maps.items() if name in names}
        return cls(**kept, grid=features.grid, maps=maps)


@dataclass(frozen=True)
class FeatureSpec:
    """The shapes of `Features` without the batch, known before step 0; `None` where the network has none."""

    logits: Shape | None = None
    embedding: Shape | None = None
    tokens: Shape | None = None
    grid: tuple[int, int] | None = None
    maps: Mapping[str, Shape] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Features) -> FeatureSpec:
        """Read the shapes off real features."""

        def shape(tensor: Tensor | None) -> Shape | None:
            return None if tensor is None else tuple(tensor.shape[1:])

        return cls(
            logits=shape(features.logits),
            embedding=shape(features.embedding),
            tokens=shape(features.tokens),
            grid=features.grid,
            maps={name: tuple(tensor.shape[1:]) for name, tensor in features.maps.items()},
        )

    def __getitem__(self, name: str) -> Shape:
        """The shape of `logits` `(K,)`, `embedding` `(d,)`, `tokens` `(N, d)` or of a tapped map.

        Raises:
            UserError: the network has none of that name.
        """
        found: Shape = _lookup(self, name)
        return found


class Taps:
    """Reads the outputs (or inputs) of named layers of any module while it runs.

    Create it before `torch.compile` and use it around the forward pass::

        taps = Taps(model, outputs={"last": "layer4"}, inputs={"embedding": "fc"})
        with taps as seen:
            logits = model(image)
        seen["last"], seen["embedding"]

    A layer that runs several times in a pass gives its last output. A layer that is replaced (as SyncBatchNorm
    replaces BatchNorm) is read under its name all the same.

    Args:
        module: the network whose layers are read.
        outputs: name of a tap -> name of the layer, as in `module.named_modules()`.
        inputs: the same, for what a layer reads instead of what it returns.

    Raises:
        UserError: a layer does not exist (with near matches).
    """

    def __init__(
        self, module: nn.Module, outputs: Mapping[str, str] | None = None, inputs: Mapping[str, str] | None = None
    ) -> None:
        self.module = module
        self.seen: dict[str, Tensor] = {}
        self.watched = True
        self.hooks: list[_OutputHook | _InputHook] = [
            *(_OutputHook(self, name, layer) for name, layer in (outputs or {}).items()),
            *(_InputHook(self, name, layer) for name, layer in (inputs or {}).items()),
        ]
        for hook in self.hooks:
            hook.attach()

    def __enter__(self) -> dict[str, Tensor]:
        self.open()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Begin a pass."""
        for hook in self.hooks:
            hook.attach()
        self.seen = {}

    def close(self) -> None:
        """End it, and keep no graph alive between steps."""
        self.seen = {}

    def protect(self) -> None:
        """Copy, from the next pass on, what is written over after its layer returned it (`ReLU(inplace=True)`).

        Call it at the end of a first pass, before the taps are left. In-place dropout writes in train mode only,
        which a pass in eval mode does not show: where there is one, everything is copied.

        Raises:
            UserError: a layer took no part in the pass.
        """
        in_place_dropout = any(isinstance(layer, _DropoutNd) and layer.inplace for layer in self.module.modules())
        for hook in self.hooks:
            if hook.name not in self.seen:
                raise UserError(f"layer {hook.layer!r} takes no part in a pass through the network: tap another one")
            hook.copy = in_place_dropout or self.seen[hook.name]._version != hook.version
        self.watched = False  # torch.compile cannot trace it


# The hooks are objects, not closures: a deep copy of a network then writes into its own taps.
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
        """Hook into the layer."""

    def record(self, tensor: Tensor) -> None:
        if self.taps.watched and not tensor.is_inference():  # an inference tensor has no version
            self.version = tensor._version  # how often it has been written in place
        self.taps.seen[self.name] = tensor.clone() if self.copy else tensor


class _OutputHook(_Hook):
    def register(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise UserError(
                f"layer {self.layer!r} returns no tensor but {type(output).__name__}: tap a layer inside it"
            )
        self.record(output)


class _InputHook(_Hook):
    def register(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self.record(inputs[0])


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """The layer `name` of `module`.

    Raises:
        UserError: there is none of that name (with near matches).
    """
    layers: dict[str, nn.Module] = dict(module.named_modules())
    if name not in layers or not name:
        raise UserError(f"no layer {name!r} in {type(module).__name__}: {did_you_mean(name, (n for n in layers if n))}")
    return layers[name]


def _lookup(source: Features | FeatureSpec, name: str) -> Any:
    if name in source.maps:
        return source.maps[name]
    own = {"logits": source.logits, "embedding": source.embedding, "tokens": source.tokens}
    if own.get(name) is None:
        known = [key for key, value in own.items() if value is not None] + list(source.maps)
        raise UserError(f"the network gives no {name!r}: {did_you_mean(name, known)}")
    return own[name]
