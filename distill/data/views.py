"""Augmented views of a training image: weak, strong, or an augmentation of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from distill.data.augmentation import Augmentation, Interpolation
from distill.errors import UserError, did_you_mean, require_at_least, under

NamedView = Literal["weak", "strong"]

_BINS = 31
"""Number of magnitudes from 0 to the largest one, as in torchvision."""

_GEOMETRIC = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


@dataclass
class RandAugment(Augmentation):
    """RandAugment (Cubuk, Zoph, Shlens, Le, 2020) of torchvision, after the data's own augmentation.

    Args:
        operations: how many are drawn, with replacement, and applied in turn.
        magnitude: of all operations, from 0 to 30.
        geometric: whether to draw shears, shifts and rotations alone, and no operation on colors or brightness; by
            default, if the images are gray, in one channel or in three equal ones.

    Raises:
        UserError: no operation, or a magnitude out of its range.
    """

    operations: int = 2
    magnitude: int = 10
    geometric: bool | None = None

    def __post_init__(self) -> None:
        require_at_least(1, operations=self.operations)
        if not 0 <= self.magnitude < _BINS:
            raise UserError(f"magnitude must be from 0 to {_BINS - 1}, given {self.magnitude}")

    def view_transform(
        self, weak: Callable[[Any], Tensor], side: int, interpolation: Interpolation, gray: bool
    ) -> Callable[[Any], Tensor]:
        """Return the data's own transform followed by RandAugment."""
        return _Strong(weak, self.operations, self.magnitude, gray if self.geometric is None else self.geometric)


View = NamedView | Augmentation


def require_views(given: Sequence[View] | None) -> tuple[View, ...]:
    """Return the views of a training image, one weak view by default.

    Raises:
        UserError: there is none, or one has an unknown name.
    """
    if given is None:
        return ("weak",)
    names = get_args(NamedView)
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise UserError(f"data.train_views must list one or more views, such as [weak, strong], given {given!r}")
    for view in given:
        if not isinstance(view, Augmentation) and view not in names:
            raise UserError(f"data.train_views: there is no view {view!r}: {did_you_mean(str(view), names)}")
    return tuple(given)


def view_transforms(
    views: Sequence[View], weak: Callable[[Any], Tensor], side: int, interpolation: Interpolation, gray: bool
) -> list[Callable[[Any], Tensor]]:
    """Return the transform of each view, given the data's own; see `Augmentation.view_transform`.

    Raises:
        UserError: a view cannot be made.
    """
    augmentations: list[View] = [RandAugment() if view == "strong" else view for view in views]
    with under("data.train_views"):
        return [
            weak if isinstance(view, str) else view.view_transform(weak, side, interpolation, gray)
            for view in augmentations
        ]


@dataclass(frozen=True)
class _Strong:
    """The weak transform followed by RandAugment, which takes bytes; an object, so that workers can unpickle it."""

    weak: Callable[[Any], Tensor]
    operations: int
    magnitude: int
    geometric: bool

    def __call__(self, image: Any) -> Tensor:
        augment = _randaugment(self.operations, self.magnitude, self.geometric)
        pixels = self.weak(image).mul(255).round().clamp(0, 255).to(torch.uint8)
        augmented: Tensor = augment(pixels)
        return augmented.float().div(255)


@lru_cache
def _randaugment(operations: int, magnitude: int, geometric: bool) -> Any:
    from torchvision.transforms import v2

    chosen: Any = v2.RandAugment(operations, magnitude, _BINS)
    if geometric:  # torchvision has no argument for it
        known = chosen._AUGMENTATION_SPACE
        chosen._AUGMENTATION_SPACE = {name: known[name] for name in _GEOMETRIC}
    return chosen
