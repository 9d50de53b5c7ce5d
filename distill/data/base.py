"""What all data modules share: the batch dict, the loaders, and counting no sample twice."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.longtail import LongTail
from distill.data.mixing import Mixing, mix, mixing_seed
from distill.data.samplers import MarkedSampler, ResumableLoader, SampleKey, ShuffledSampler
from distill.data.sources import Source, Subset, count_classes, labels_of
from distill.errors import UserError
from distill.randomness import seeded_by

Split = Literal["train", "val", "test"]
Sample = dict[str, Any]
ExtraFields = Callable[[Tensor], dict[str, Tensor]]


class ImageDataset(Dataset[Sample]):
    """A set of images as dicts of `image` `[C, H, W]` in [0, 1], `label` (-1: unlabeled) and `index`.

    A training sample is asked for as (draw, index), and its augmentation depends on these and the seed alone: not on
    workers, ranks, or what was drawn before. An index past the end stands for a sample that only fills up a rank's
    last batch; it comes with `index` -1.

    Args:
        source: gives (image, label) at a position.
        transform: from what `source` gives to a float tensor.

    Attributes:
        annotate: what else to find out about an image, after its transform: entries of the batch by name.
        seed: of the augmentation and the order.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor]) -> None:
        self.source = source
        self.transform = transform
        self.extra_fields: ExtraFields | None = None
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where Lightning keeps the run's seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int | SampleKey) -> Sample:
        draw, position = place if isinstance(place, tuple) else (0, place)
        index = position % len(self)
        image, label = self.source[index]
        with seeded_by("augmentation", self.seed, draw, index):
            image = self.transform(image)
        sample = {"image": image, "label": int(label), "index": index if index == position else -1, "draw": draw}
        return sample if self.extra_fields is None else {**sample, **self.extra_fields(image)}


class ImageData(LightningDataModule, ABC):
    """Base of the data modules: a subclass gives `num_classes`, `image_shape` and its three sets of samples.

    Args:
        batch_size: images a process and step.
        num_workers: processes that prepare batches.
        mixing: mixup and CutMix on training batches.
        repetitions: how often a training image comes in an epoch, each time augmented anew; the epoch keeps its length.
        longtail: makes the training set long-tailed; a test then tells many-, medium- and few-shot classes apart.
        class_balanced: draw training images so that every class comes equally often, each time augmented anew; the
            epoch keeps its length. Images without a label are not drawn.

    Attributes:
        annotate: what workers find out about each image after its augmentation, entries of the batch by name.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    extra_fields: ExtraFields | None = None

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        mixing: Mixing | None = None,
        repetitions: int = 1,
        longtail: LongTail | None = None,
        class_balanced: bool = False,
    ) -> None:
        super().__init__()
        for name, number in (("batch_size", batch_size), ("repetitions", repetitions)):
            if number < 1:
                raise UserError(f"data.{name} must be at least 1, given {number}")
        if class_balanced and repetitions > 1:
            raise UserError(
                f"data.class_balanced repeats the images of rare classes by itself: give data.repetitions 1 with it, "
                f"not {repetitions}"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.mixing = mixing
        self.repetitions = repetitions
        self.longtail = longtail
        self.class_balanced = class_balanced
        self._samples: dict[Split, ImageDataset] = {}
        self._train_loader: ResumableLoader | None = None
        self._resumed: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        """Hold the training images against batch size and sampling before anything of a run is written."""
        if stage != "fit":
            return
        if len(samples := self._cached("train")) < self.batch_size:
            raise UserError(
                f"data.batch_size is {self.batch_size}, more than the {len(samples)} training images: "
                f"give {len(samples)} or less"
            )
        if self.class_balanced and 0 in (counts := self.class_counts()):
            raise UserError(
                f"data.class_balanced draws from every class, but class {counts.index(0)} has no labeled training image"
            )

    @abstractmethod
    def samples(self, split: Split) -> ImageDataset:
        """The samples of a split, before any `longtail`; the training split with its augmentation."""

    def class_counts(self) -> list[int]:
        """How many labeled training images each class has, after any `longtail`.

        Raises:
            UserError: the source of the images does not tell their labels.
        """
        return count_classes(labels_of(self._cached("train").source), self.num_classes)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of equal size, taken up where a checkpoint left them; an epoch's remainder is dropped."""
        samples = self._cached("train")
        labels = labels_of(samples.source) if self.class_balanced else None
        sampler = ShuffledSampler(
            samples, *self._ranks(), seed=samples.seed, repetitions=self.repetitions, balanced=labels
        )
        self._train_loader = ResumableLoader(samples, sampler=sampler, drop_last=True, **self._settings())
        self._train_loader.load_state_dict(self._resumed)
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation images in order, each counted once on any number of ranks."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """The test images in order, each counted once on any number of ranks."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The test images."""
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, int]:
        """How far the training data have been given out; Lightning keeps it in the checkpoints."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self._resumed = state_dict

    def on_before_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Derive the key of a training batch's mixing while its index is on the host."""
        if self.mixing is None or self.trainer is None or not self.trainer.training:
            return batch
        return {**batch, "mixing_seed": mixing_seed(batch, self._cached("train").seed)}

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Mix training batches on the device."""
        if self.mixing is None or "mixing_seed" not in batch:
            return batch
        seed = batch.pop("mixing_seed")
        return mix(batch, self.num_classes, self.mixing, seed)

    def _evaluation_loader(self, split: Split) -> DataLoader[Sample]:
        samples = self._cached(split)
        return DataLoader(samples, sampler=MarkedSampler(samples, *self._ranks()), **self._settings())

    def _cached(self, split: Split) -> ImageDataset:
        if split not in self._samples:
            samples = self.samples(split)
            if split == "train" and self.longtail is not None:
                samples.source = Subset(samples.source, self.longtail.positions(samples.source, self.num_classes))
            self._samples[split] = samples
        self._samples[split].extra_fields = self.extra_fields
        return self._samples[split]

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator().manual_seed(0),  # so that loaders draw nothing from the global one
        }
