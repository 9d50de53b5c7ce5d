"""The pass of a teacher over all draws of all images, which fills a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data import ImageData, ImageDataset, Split
from distill.data.dataset import ViewKey, key_of_stored
from distill.data.samplers import SampleKey
from distill.features import Features
from distill.heads import Batch
from distill.objective import Objective
from distill.precision import at_least_float32
from distill.store import Quantity, Rows, StoreIndex, missing_shards, write_shard
from distill.store.requests import FEATURES, Request
from distill.training.base import DistillerModule

SHARD = 64 * 2**20
"""Size of a file of rows at most, in bytes, unless a single batch is larger."""
SHARDS = 16
"""Number of files that a split has at least, if it has so many batches: what is written survives an interruption."""


@dataclass(frozen=True)
class Missing:
    """The rows of a split that are still to be computed.

    Args:
        split: of the images.
        rows: of the split.
        shards: the quantities that lack, by number of the file.
    """

    split: Split
    rows: Rows
    shards: Mapping[int, Sequence[Quantity]]

    @property
    def bytes(self) -> int:
        """The size of the files to write."""
        return sum(
            len(self.rows.of(number)) * quantity.bytes
            for number, quantities in self.shards.items()
            for quantity in quantities
        )

    def share(self, part: int, parts: int) -> Missing:
        """Return the files that one of several processes is to write."""
        shards = {number: each for number, each in self.shards.items() if number % parts == part}
        return replace(self, shards=shards)

    def keys(self, batch_size: int) -> Iterator[tuple[int, int]]:
        """Yield stored draw and index of every row, file after file, each file filled up to whole batches."""
        for number in self.shards:
            rows = self.rows.of(number)
            for offset in range(ceil(len(rows) / batch_size) * batch_size):
                row = (rows.start + offset) % len(self.rows)
                yield row // self.rows.images, row % self.rows.images


def missing(folder: Path, index: StoreIndex, wanted: Mapping[Split, Sequence[Quantity]]) -> list[Missing]:
    """Return what a store lacks of the wanted quantities of each split."""
    found = []
    for split, quantities in wanted.items():
        rows = index.splits[split]
        shards: dict[int, list[Quantity]] = {}
        for quantity in quantities:
            for number in missing_shards(folder, split, quantity, rows, index.key):
                shards.setdefault(number, []).append(quantity)
        found.append(Missing(split, rows, dict(sorted(shards.items()))))
    return found


def rows_of(images: int, draws: int, batch_size: int, row_bytes: int) -> Rows:
    """Return the rows of a split, in files that have whole batches and are neither too large nor too few."""
    batches = ceil(images * draws / batch_size)
    fitting = max(1, min(SHARD // (batch_size * row_bytes), batches // SHARDS))
    return Rows(images, draws, per_shard=batch_size * fitting)


def answers(
    objective: Objective, requests: Mapping[str, Request], features: Sequence[str], teacher: Features, batch: Batch
) -> dict[str, Tensor]:
    """Compute what is stored of a batch, `[B, *shape]` by name of the quantity.

    Args:
        objective: with the terms.
        requests: of the terms.
        features: names of the teacher's own features to store besides.
        teacher: the teacher's features.
        batch: the batch.
    """
    found: dict[str, Tensor] = {name: at_least_float32(teacher[name]) for name in features}
    seen: set[tuple[Any, ...]] = set()
    for term, request in requests.items():
        if (same := (request.prefix, request.features, request.dtype)) in seen:
            continue
        seen.add(same)
        for part, tensor in _tensors(objective.summary(term, teacher, batch)):
            dtype = tensor.dtype if request.dtype == "float32" else getattr(torch, request.dtype)
            found.setdefault(request.name(part), tensor.to(dtype))
    return found


def write_missing(
    trainer: Trainer,
    module: DistillerModule,
    data: ImageData,
    teacher: str,
    requests: Mapping[str, Request],
    lacking: Missing,
    index: StoreIndex,
    folder: Path,
) -> None:
    """Compute what a split lacks and write it, file by file.

    Args:
        trainer: which has the device, the precision, and the callbacks that add to the batches.
        module: with the teachers and the objective.
        data: the images.
        teacher: name of the teacher.
        requests: of the terms that are stored.
        lacking: what to write.
        index: of the store.
        folder: of the store.
    """
    if not lacking.shards:
        return
    writer = _Writer(folder, index.key, lacking)
    views = len(data.train_views) if lacking.split == "train" else 1
    keys = [key_of_stored(draw, index, views) for draw, index in lacking.keys(data.batch_size)]
    images = _KeyedImages(data, lacking.split, keys)
    trainer.limit_predict_batches = 1.0  # all of them, also in a configuration for a short trial
    trainer.predict(_Pass(module, teacher, requests, writer), datamodule=images, return_predictions=False)


class _Writer:
    """Collects the rows of batches and writes each file as soon as it is complete."""

    def __init__(self, folder: Path, key: str, lacking: Missing) -> None:
        self.folder, self.key, self.lacking = folder, key, lacking
        self.names = {quantity.name for quantities in lacking.shards.values() for quantity in quantities}
        self._numbers = iter(lacking.shards)
        self._collected: dict[str, list[Tensor]] = {}
        self._count = 0
        self._number = next(self._numbers)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add a batch, which belongs to a single file."""
        for name in self.names:
            self._collected.setdefault(name, []).append(rows[name].cpu())
        self._count += len(rows[next(iter(self.names))])
        if self._count >= (wanted := len(self.lacking.rows.of(self._number))):
            for quantity in self.lacking.shards[self._number]:
                content = torch.cat(self._collected[quantity.name])[:wanted]
                write_shard(self.folder, self.lacking.split, quantity, self._number, content, self.key)
            self._collected, self._count = {}, 0
            self._number = next(self._numbers, -1)


class _Pass(DistillerModule):
    """Runs the teacher alone on the batches that a training would have."""

    def __init__(self, module: DistillerModule, teacher: str, requests: Mapping[str, Request], writer: _Writer) -> None:
        super().__init__()
        self.distiller = module.distiller
        self.image_shape = module.image_shape
        self.batch_names = module.batch_names
        self._teacher, self._writer = teacher, writer
        self._requests = {term: each for term, each in requests.items() if any(map(each.asks_for, writer.names))}
        self._own = [name for name in FEATURES if name in writer.names]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Compute what is stored of a batch."""
        rows = self._answers(batch)
        if batch_idx == 0:
            self._warn_of_places(batch, rows)
        self._writer.add(rows)
        return {}  # Lightning warns of nothing at all

    def _answers(self, batch: Batch) -> dict[str, Tensor]:
        teacher = self.distiller.teacher_features(batch, [self._teacher])[self._teacher]
        return answers(self.distiller.objective, self._requests, self._own, teacher, batch)

    def _warn_of_places(self, batch: Batch, rows: Mapping[str, Tensor]) -> None:
        """Warn if the rows depend on the images' places: kernels may round the last rows of a batch differently."""
        difference = 0.0
        places = torch.arange(len(batch["image"]), device=batch["image"].device)
        for order in (places.flip(0), places.roll(1)):
            moved = {key: value[order] if isinstance(value, Tensor) else value for key, value in batch.items()}
            for name, computed in self._answers(moved).items():
                difference = max(difference, float((computed.double() - rows[name][order].double()).abs().max()))
        if difference > 0:
            rank_zero_warn(
                f"what {self.teachers[self._teacher].name} computes of an image depends on its place in the batch of "
                f"{len(places)}, by up to {difference:.1g}: a run with the store agrees with one with the network to "
                "rounding, not bit for bit, unless data.batch_size is one without this warning, like a multiple of 32"
            )


class _KeyedImages(ImageData):
    """The samples of a data module with given draws and indices, as images to predict."""

    def __init__(self, data: ImageData, split: Split, keys: Sequence[SampleKey | ViewKey]) -> None:
        super().__init__(batch_size=data.batch_size, num_workers=data.num_workers)
        self.num_classes, self.image_shape = data.num_classes, data.image_shape
        self._data, self._split, self._keys = data, split, keys

    def samples(self, split: Split) -> ImageDataset:
        """Return the samples of a split."""
        return self._data.samples(split)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the samples of the keys."""
        self._data.extra_fields = self.extra_fields
        return self._data.keyed_dataloader(self._split, self._keys)


def _tensors(summary: Features) -> Iterator[tuple[str, Tensor]]:
    for name in FEATURES:
        if (tensor := getattr(summary, name)) is not None:
            yield name, tensor
    yield from summary.maps.items()
