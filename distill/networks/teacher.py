"""Networks that teach and never learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import Any, Self

import torch
from torch import Tensor

from distill.errors import UserError, did_you_mean
from distill.features import Features, FeatureSpec
from distill.networks.base import FeatureSource, Network


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
    def features(self, image: Tensor, others: Mapping[str, Features]) -> Features:
        """Return the features of a batch.

        Args:
            image: `[B, C, H, W]`, in [0, 1] and not normalized.
            others: features of the teachers named in `of`, for the same images.
        """


class FrozenTeacher(Teacher):
    """Run a network in eval mode and without gradient, whatever happens to the module that contains it.

    The network is not registered as a submodule: its tensors are in no checkpoint, no optimizer, no weight average
    and no broadcast, and neither `train()` nor `requires_grad_()` of the containing module reaches them. It does
    follow that module to other devices and, unless it has a dtype, to other dtypes.

    Args:
        network: the teacher, built.
        dtype: of its weights and its forward pass, which then runs outside autocast; `None` follows the trainer's
            precision, unless the network computes in one dtype only.

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
        if self.dtype is not None:
            network.model.to(self.dtype)  # the mean and std of the images keep their dtype
        self.train(False)

    @property
    def network(self) -> Network:
        """The wrapped network."""
        return self._unregistered[0]

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
        has_dtype = self.dtype is not None
        with torch.autocast(image.device.type, enabled=False) if has_dtype else nullcontext():
            features: Features = self.network(image)
        return features

    def features(self, image: Tensor, others: Mapping[str, Features]) -> Features:
        """Compute the teacher's features; `others` is not used."""
        features: Features = self(image)
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

    Every feature of which all members have the same shape is averaged: logits, embedding, tokens, and maps of the same
    name. The members run once per step, whoever else reads them.

    Args:
        of: names of the members, which are other entries of `model.teachers`.

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
        specs = [members[name].spec for name in self.of]
        first, *rest = specs
        kept = {
            name: shape
            for name in ("logits", "embedding", "tokens")
            if (shape := getattr(first, name)) is not None and all(getattr(spec, name) == shape for spec in rest)
        }
        if any(spec.grid != first.grid for spec in rest):
            kept.pop("tokens", None)
        maps = {name: shape for name, shape in first.maps.items() if all(spec.maps.get(name) == shape for spec in rest)}
        if not kept and not maps:
            found = "; ".join(f"{name}: {_shapes(spec)}" for name, spec in zip(self.of, specs, strict=True))
            raise UserError(f"of: the teachers have no feature of the same shape to average ({found})")
        self._spec = FeatureSpec(**kept, grid=first.grid if "tokens" in kept else None, maps=maps)
        self._fingerprint = sha256(" ".join(members[name].fingerprint for name in self.of).encode()).hexdigest()

    def features(self, image: Tensor, others: Mapping[str, Features]) -> Features:
        """Average the features of the members."""
        members = [others[name] for name in self.of]

        def mean(name: str) -> Tensor:
            return torch.stack([member[name] for member in members]).mean(dim=0)

        present = {name for name in ("logits", "embedding", "tokens") if getattr(self.spec, name) is not None}
        kept: dict[str, Any] = {name: mean(name) for name in present}
        return Features(**kept, grid=self.spec.grid, maps={name: mean(name) for name in self.spec.maps})


def teacher_features(teachers: Mapping[str, Teacher], image: Tensor, names: Iterable[str]) -> dict[str, Features]:
    """Compute the features of a batch, each teacher once.

    Args:
        teachers: all teachers by name.
        image: `[B, C, H, W]`, in [0, 1] and not normalized.
        names: the teachers to run; those that they are made of run too.

    Returns:
        Features by teacher name.
    """
    found: dict[str, Features] = {}

    def run(name: str) -> None:
        for member in teachers[name].of:
            run(member)
        if name not in found:
            found[name] = teachers[name].features(image, found)

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
    shapes = {"logits": spec.logits, "embedding": spec.embedding, "tokens": spec.tokens, **spec.maps}
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items() if shape is not None)
