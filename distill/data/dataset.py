"""Samples of a data module as dicts, augmented by a key."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.data.augmentation import BytesTransform, in_unit_range
from distill.data.samplers import SampleKey
from distill.data.sources import Source
from distill.errors import UserError
from distill.randomness import seed_states, unchanged_states

Split = Literal["train", "val", "test"]
Sample = dict[str, Any]
ExtraFields = Callable[[Tensor], dict[str, Tensor]]
StoredRows = Callable[[Sequence[SampleKey]], list[dict[str, Any]]]
ViewKey = tuple[int, int, int]
"""Draw, index and view, for one view of a sample."""

_READ_AHEAD = 16
"""Number of images that are read before they are augmented: to restore the random states takes 0.1 ms each time."""


class ImageDataset(Dataset[Sample]):
    """Images as dicts of `image` `[C, H, W]` in [0, 1], `label` (-1: unlabeled), `index`, `draw` and perhaps `view`.

    A training sample is requested by (draw, index), and its augmentation depends only on these and the seed: not on
    workers, ranks, or samples drawn before. An index past the end stands for a sample that only pads a rank's last
    batch; it is returned with `index` -1.

    With several views, a batch holds each image as often, view after view: the first view of all images, then the
    second of all. The augmentation of a view after the first depends on its number besides. A key (draw, index, view)
    asks for one view alone, without the entry `view`.

    Args:
        source: returns (image, label) for a position.
        transform: from the source's image to a float tensor.

    Attributes:
        views: the transform of each view; by default one view, that of `transform`.
        extra_fields: computes further entries of the batch, by name, from a transformed image.
        stored: returns what is stored of samples, by `stored_draw` and index; it is the entry `stored` of each.
        seed: of the augmentation.
        in_bytes: whether images are uint8, in [0, 255], where their transform is a `BytesTransform` that ends in bytes.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor]) -> None:
        self.source = source
        self.transform = transform
        self.views: Sequence[Callable[[Any], Tensor]] = ()
        self.extra_fields: ExtraFields | None = None
        self.stored: StoredRows | None = None
        self.seed = run_seed()
        self.in_bytes = False

    def as_bytes(self) -> ImageDataset:
        """Return the same images `in_bytes`, a quarter of the memory, which `in_unit_range` turns into the floats."""
        dataset = copy(self)
        dataset.in_bytes = all(isinstance(transform, BytesTransform) for transform in self.views or (self.transform,))
        return dataset

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | SampleKey | ViewKey) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SampleKey | ViewKey]) -> list[Sample]:
        """Return the samples of a batch, as torch's loaders ask for them, view after view."""
        images = []
        for first in range(0, len(keys), _READ_AHEAD):
            images += self._augmented(keys[first : first + _READ_AHEAD])
        places, samples = zip(*(each for view in zip(*images, strict=True) for each in view), strict=True)
        if self.stored is not None:
            stored = self.stored(places)
            return [{**sample, "stored": rows} for sample, rows in zip(samples, stored, strict=True)]
        return list(samples)

    def _augmented(self, keys: Sequence[int | SampleKey | ViewKey]) -> list[list[tuple[SampleKey, Sample]]]:
        """Return the views of each image, each with its place among what is stored."""
        full: list[Any] = [(*key, None)[:3] if isinstance(key, tuple) else (0, key, None) for key in keys]
        pairs = [self.source[position % len(self)] for _, position, _ in full]
        with unchanged_states():
            found = [
                self._views(draw, position, view, image, label)
                for (draw, position, view), (image, label) in zip(full, pairs, strict=True)
            ]
        if self.extra_fields is not None:
            for _, sample in (view for views in found for view in views):
                sample |= self.extra_fields(in_unit_range(sample["image"]))
        return found

    def _views(
        self, draw: int, position: int, view: int | None, image: Any, label: Any
    ) -> list[tuple[SampleKey, Sample]]:
        """Return the views of an image as `_augmented` does, and leave the random states seeded."""
        transforms = self.views or (self.transform,)
        index = position % len(self)
        entries = {"label": int(label), "index": index if index == position else -1, "draw": draw}
        found: list[tuple[SampleKey, Sample]] = []
        for number in range(len(transforms)) if view is None else (view,):
            seed_states("augmentation", self.seed, draw, index, *((number,) if number > 0 else ()))
            sample = {"image": self._transformed(transforms[number], image), **entries}
            if view is None and len(transforms) > 1:
                sample["view"] = number
            found.append(((stored_draw(draw, number, len(transforms)), index), sample))
        _require_one_size([sample["image"] for _, sample in found])
        return found

    def _transformed(self, transform: Callable[[Any], Tensor], image: Any) -> Tensor:
        if not self.in_bytes or not isinstance(transform, BytesTransform):
            return transform(image)
        pixels = transform.pixels(image)
        return pixels if pixels.dtype == torch.uint8 else in_unit_range(pixels)


def _require_one_size(views: Sequence[Tensor]) -> None:
    for number, image in enumerate(views):
        if image.shape != views[0].shape:
            sizes = [" x ".join(map(str, each.shape)) for each in (image, views[0])]
            raise UserError(
                f"data.train_views: view {number} of an image is {sizes[0]}, but view 0 is {sizes[1]}: give views of "
                "one size"
            )


def stored_draw(draw: int, view: int, views: int) -> int:
    """Return the number of a view of a draw among all of an image, by which a store knows it."""
    return draw * views + view


def key_of_stored(draw: int, index: int, views: int) -> SampleKey | ViewKey:
    """Return the key of the sample that a store knows by `stored_draw` and index."""
    return (draw, index) if views == 1 else (draw // views, index, draw % views)


def run_seed() -> int:
    """Return the seed that Lightning's `seed_everything` has set, 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
