"""Data modules as users write them, with nothing of this project in them, and the same images in the project's own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from distill.data import ArraySource, ImageData, ImageDataset, Split


def images_of(split: str, count: int = 0) -> tuple[Tensor, Tensor]:
    """Return float images `[N, 3, 32, 32]` and labels `[N]` of a split."""
    generator = torch.Generator().manual_seed(len(split))
    count = count or {"train": 48, "val": 20, "test": 12}[split]
    return torch.rand(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)


class Pairs(Dataset[Any]):
    """Images with or without labels."""

    def __init__(self, split: str, labels: bool, kind: str = "tuple") -> None:
        self.images, self.labels = images_of(split)
        self.has_labels, self.kind = labels, kind

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], int(self.labels[index])
        if self.kind == "dict":
            return {"pixel_values": image, "labels": label} if self.has_labels else {"pixel_values": image}
        if self.kind == "index":
            return image, label, index
        return (image, label) if self.has_labels else image


class OwnData(LightningDataModule):
    """A data module of a user: it yields tuples or dicts, in order, and has no test images."""

    def __init__(self, labels: bool = True, kind: str = "tuple", batch_size: int = 8, shuffle: bool = False) -> None:
        super().__init__()
        self.labels, self.kind, self.batch_size, self.shuffle = labels, kind, batch_size, shuffle

    def setup(self, stage: str) -> None:
        """Read the images."""
        self.train, self.val = (Pairs(split, self.labels, self.kind) for split in ("train", "val"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=self.shuffle, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation images."""
        return DataLoader(self.val, batch_size=self.batch_size)


class OwnStream(OwnData):
    """A data module of a user whose images come one after the other, without a length."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images."""
        return DataLoader(Stream(self.train), batch_size=self.batch_size)


class Stream(IterableDataset[Any]):
    """The samples of a data set, without its length."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[index] for index in range(len(self.dataset)))  # type: ignore[arg-type]


class OwnSeveral(OwnData):
    """A data module of a user with several loaders for training, whose batch its `on_before_batch_transfer` makes."""

    def train_dataloader(self) -> Any:
        """Return two loaders."""
        loaders = [DataLoader(self.train, batch_size=self.batch_size) for _ in range(2)]
        return dict(zip("ab", loaders, strict=True)) if self.kind == "dict" else loaders

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put the batches of the loaders into one."""
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        if isinstance(parts[0], Tensor):  # of a validation, by one loader
            return batch
        if isinstance(parts[0], dict):
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return [torch.cat(each) for each in zip(*parts, strict=True)]


class OwnRest(OwnData):
    """A data module of a user that keeps the images at the end of an epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images."""
        return DataLoader(self.train, batch_size=self.batch_size)


class OwnSampler(OwnData):
    """A data module of a user that deals the images to the ranks itself (`trainer.use_distributed_sampler: false`)."""

    def sampler(self, dataset: Dataset[Any], shuffle: bool) -> DistributedSampler[Any]:
        """Return this rank's share of a data set, whose order depends on the epoch alone."""
        assert self.trainer is not None
        return DistributedSampler(
            dataset, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=shuffle, seed=7
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's training images."""
        sampler = self.sampler(self.train, shuffle=True)
        return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this rank's validation images."""
        return DataLoader(self.val, batch_size=self.batch_size, sampler=self.sampler(self.val, shuffle=False))


class OwnOnDevice(OwnData):
    """A data module of a user that scales bytes in Lightning's transfer hooks, whose batches are its own tuples."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn the images into bytes, as a reader of files would give them."""
        image, label = batch
        return (255 * image).round().byte(), label

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scale the images on the device."""
        image, label = batch
        return image.float() / 255, label


class SameImages(ImageData):
    """The same images in a data module of this project, in the same order."""

    image_shape = (3, 32, 32)

    def __init__(self, labels: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.num_classes = 10 if labels else 0

    def samples(self, split: Split) -> ImageDataset:
        """Return the images of a split."""
        images, labels = images_of(split)
        if not self.num_classes:
            labels = torch.full_like(labels, -1)
        return ImageDataset(ArraySource(images, labels), _same)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images in their order."""
        return DataLoader(self._cached("train"), batch_size=self.batch_size, drop_last=True)


def _same(image: Tensor) -> Tensor:
    return image


class KillOnce(Callback):
    """Kills this process before an optimizer step, unless a file says that it has done so."""

    def __init__(self, step: int, file: str) -> None:
        self.step, self.file = step, Path(file)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave the file and kill."""
        if trainer.global_step == self.step and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
