"""Networks that teach and never learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Self

import torch
from torch import Tensor

from distill.errors import UserError, did_you_mean
from distill.features import Features, FeatureSpec, Shape
from distill.networks.base import FeatureSource, Network
from distill.networks.half_precision import halve


class Teacher(FeatureSource):
    """A source of the features that a student is compared with, which never trains.

    Attributes:
        of: names of other teachers that its features are computed from; empty if it looks at the images itself.
    """

    of: Sequence[str] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The name shown in tables."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that determines the features."""

    @property
    @abstractmethod
    def spec(self) -> FeatureSpec:
        """The shapes of its features."""

    @abstractmethod
    def features(self, batch: Mapping[str, Any], others: Mapping[str, Features]) -> Features:
        """Return the features of a batch.

        Args:
            batch: with `image` `[B, C, H, W]`, in [0, 1] and not normalized.
            others: features of the teachers named in `of`, for the same images.
        """

    def gives(self, name: str, split: str) -> bool:
        """Return True if the feature `name` is known for the images of a split: `train`, `val` or `test`."""
        try:
            self.spec[name]
        except UserError:
            return False
        return True


class FrozenTeacher(Teacher):
    """Run a network in eval mode and without gradient, whatever happens to the module that contains it.

    The network is not registered as a submodule: its tensors are in no checkpoint, no optimizer, no weight average
    and no broadcast, and neither `train()` nor `requires_grad_()` of the containing module reaches them. It does
    follow that module to other devices and, unless it has a dtype, to other dtypes.

    Args:
        network: the teacher, built.
        dtype: of its weights and its forward pass, whatever the trainer's precision; `None` follows the latter, unless
            the network computes in one dtype only. In half precision, norms and sums stay in float32, see `halve`.

    Attributes:
        fingerprint: sha256 of the weights as they were loaded, before the cast to `dtype`.

    Raises:
        UserError: the network computes in another dtype only.
    """

    def __init__(self, network: Network, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if network.dtype not in (None, dtype) and dtype is not None:
            raise UserError(
                f"{network.name} computes in {network.dtype} only, as torch.export baked in, not in {dtype}"
            )
        self.dtype = network.dtype if dtype is None else dtype
        self._fingerprint = fingerprint(network.model.state_dict())
        # In a tuple, so that nn.Module does not register the network as a submodule.
        self._unregistered = (network.eval().requires_grad_(False),)
        self._is_mixed = False
        if network.dtype is None and self.dtype in (torch.float16, torch.bfloat16):
            self._is_mixed = halve(network, self.dtype)
        elif self.dtype is not None:
            network.model.to(self.dtype)  # the mean and std of the images keep their dtype
        self.train(False)

    @property
    def network(self) -> Network:
        """The wrapped network."""
        return self._unregistered[0]

    def share(self, original: FrozenTeacher) -> None:
        """Have the network of the teacher that this one is a copy of."""
        self._unregistered = original._unregistered

    @property
    def spec(self) -> FeatureSpec:
        """The shapes of its features."""
        return self.network.spec

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return self.network.name

    @property
    def fingerprint(self) -> str:
        """The sha256 of the weights as they were loaded."""
        return self._fingerprint

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """Compute the teacher's features of `image` `[B, C, H, W]`, in [0, 1] and not normalized."""
        if self.dtype is None:
            precision: AbstractContextManager[object] = nullcontext()
        else:
            dtype = self.dtype if self._is_mixed else None
            precision = torch.autocast(image.device.type, dtype, enabled=self._is_mixed)
        with precision:
            features: Features = self.network(image)
        return features

    def features(self, batch: Mapping[str, Any], others: Mapping[str, Features]) -> Features:
        """Compute the teacher's features of `image`; `others` is not used."""
        features: Features = self(batch["image"])
        return features

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.dtype is None:
            self.network._apply(fn)  # type: ignore[no-untyped-call]  # torch's has no types
        else:  # only to the device
            self.network.to(fn(next(self.network.parameters()).new_empty(0)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nor this
        return self


class Ensemble(Teacher):
    """The average of other teachers' features.

    Every feature of which all members have the same shape is averaged, in at least float32: logits, embedding, tokens,
    and maps of the same name. Features whose shapes differ it does not have. The members, which may be ensembles
    themselves, run once per step, whoever else reads them.

    Args:
        of: names of the members: other entries of `model.teachers`, or `teacher` for the one of `model.teacher`.

    Raises:
        UserError: fewer than two members.
    """

    def __init__(self, of: Sequence[str]) -> None:
        super().__init__()
        if len(of) < 2 or len(set(of)) < len(of):
            raise UserError(f"of: an ensemble needs at least two different teachers, given {list(of)}")
        self.of = tuple(of)
        self._spec = FeatureSpec()
        self._fingerprint = ""

    @property
    def name(self) -> str:
        """The name shown in tables."""
        return f"mean of {' and '.join(self.of)}"

    @property
    def fingerprint(self) -> str:
        """The sha256 of the members' fingerprints."""
        return self._fingerprint

    @property
    def spec(self) -> FeatureSpec:
        """The shapes of the features that are averaged."""
        return self._spec

    def build(self, members: Mapping[str, Teacher]) -> None:
        """Determine the features that the members have in common.

        Args:
            members: the available teachers.

        Raises:
            UserError: a member is not available, or the members have no feature of the same shape.
        """
        for name in self.of:
            if name not in members:
                raise UserError(f"of: there is no teacher {name!r} to average: {did_you_mean(name, members)}")
        specs = {name: members[name].spec for name in self.of}
        first, *rest = specs.values()
        kept = {
            name: shape
            for name in ("logits", "embedding", "tokens")
            if (shape := getattr(first, name)) is not None and all(getattr(spec, name) == shape for spec in rest)
        }
        if any(spec.grid != first.grid for spec in rest):
            kept.pop("tokens", None)
        maps = {name: shape for name, shape in first.maps.items() if all(spec.maps.get(name) == shape for spec in rest)}
        if not kept and not maps:
            found = "; ".join(f"{name}: {_shapes(spec)}" for name, spec in specs.items())
            raise UserError(f"of: the teachers have no feature of the same shape to average ({found})")
        grid = first.grid if "tokens" in kept else None
        self._spec = _SharedSpec(**kept, grid=grid, maps=maps, members=specs)
        self._fingerprint = sha256(" ".join(members[name].fingerprint for name in self.of).encode()).hexdigest()

    def features(self, batch: Mapping[str, Any], others: Mapping[str, Features]) -> Features:
        """Average the features of the members."""
        members = [others[name] for name in self.of]

        def mean(name: str) -> Tensor:
            tensors = [member[name] for member in members]
            tensors = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
            return torch.stack(tensors).mean(dim=0)

        shared = [name for name in ("logits", "embedding", "tokens") if getattr(self.spec, name) is not None]
        kept: dict[str, Any] = {name: mean(name) for name in shared}
        return Features(**kept, grid=self.spec.grid, maps={name: mean(name) for name in self.spec.maps})


@dataclass(frozen=True)
class _SharedSpec(FeatureSpec):
    """The shapes that the members of an ensemble share; a feature that it lacks is explained by theirs."""

    members: Mapping[str, FeatureSpec] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Shape:
        try:
            return super().__getitem__(name)
        except UserError:
            shapes = {member: _shape_of(spec, name) for member, spec in self.members.items()}
            if not any(shapes.values()):
                raise
            found = ", ".join(f"{member} {shape or 'none'}" for member, shape in shapes.items())
            raise UserError(f"an ensemble averages only equal shapes, and those of {name!r} are: {found}") from None


def teacher_features(
    teachers: Mapping[str, Teacher], batch: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Features]:
    """Compute the features of a batch, each teacher once.

    Args:
        teachers: all teachers by name.
        batch: with `image` `[B, C, H, W]`, in [0, 1] and not normalized.
        names: the teachers to run; those that they are made of run too.

    Returns:
        Features by teacher name.
    """
    found: dict[str, Features] = {}

    def run(name: str) -> None:
        if name in found:
            return
        for member in teachers[name].of:
            run(member)
        found[name] = teachers[name].features(batch, found)

    for name in names:
        run(name)
    return found


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the names, shapes, dtypes and bytes of a state dict, in the order of the names."""
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shapes(spec: FeatureSpec) -> str:
    found = {name: _shape_of(spec, name) for name in ("logits", "embedding", "tokens", *spec.maps)}
    return ", ".join(f"{name} {shape}" for name, shape in found.items() if shape)


def _shape_of(spec: FeatureSpec, name: str) -> str:
    """Return the shape of a feature as text; of tokens, their grid too; an empty text for a feature that is missing."""
    shape = {"logits": spec.logits, "embedding": spec.embedding, "tokens": spec.tokens, **spec.maps}.get(name)
    if shape is None:
        return ""
    grid = f" ({spec.grid[0]} x {spec.grid[1]} cells)" if name == "tokens" and spec.grid is not None else ""
    return " x ".join(map(str, shape)) + grid
