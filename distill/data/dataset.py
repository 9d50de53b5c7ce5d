"""Samples of a data module as dicts, augmented by a key."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from distill.data.samplers import SampleKey
from distill.data.sources import Source
from distill.randomness import seeded_by

Split = Literal["train", "val", "test"]
Sample = dict[str, Any]
ExtraFields = Callable[[Tensor], dict[str, Tensor]]
StoredRows = Callable[[Sequence[SampleKey]], list[dict[str, Any]]]


class ImageDataset(Dataset[Sample]):
    """Images as dicts of `image` `[C, H, W]` in [0, 1], `label` (-1: unlabeled), `index` and `draw`.

    A training sample is requested by (draw, index), and its augmentation depends only on these and the seed: not on
    workers, ranks, or samples drawn before. An index past the end stands for a sample that only pads a rank's last
    batch; it is returned with `index` -1.

    Args:
        source: returns (image, label) for a position.
        transform: from the source's image to a float tensor.

    Attributes:
        extra_fields: computes further entries of the batch, by name, from a transformed image.
        stored: returns what is stored of samples, by draw and index; it is the entry `stored` of each.
        seed: of the augmentation.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor]) -> None:
        self.source = source
        self.transform = transform
        self.extra_fields: ExtraFields | None = None
        self.stored: StoredRows | None = None
        self.seed = run_seed()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> list[Sample]:
        """Return the samples of a batch, as torch's loaders ask for them."""
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        samples = [self._sample(draw, position) for draw, position in pairs]
        if self.stored is not None:
            stored = self.stored([(draw, position % len(self)) for draw, position in pairs])
            samples = [{**sample, "stored": rows} for sample, rows in zip(samples, stored, strict=True)]
        return samples

    def _sample(self, draw: int, position: int) -> Sample:
        index = position % len(self)
        image, label = self.source[index]
        with seeded_by("augmentation", self.seed, draw, index):
            image = self.transform(image)
        sample = {"image": image, "label": int(label), "index": index if index == position else -1, "draw": draw}
        return sample if self.extra_fields is None else {**sample, **self.extra_fields(image)}


def run_seed() -> int:
    """Return the seed that Lightning's `seed_everything` has set, 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
