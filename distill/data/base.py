"""Base of all data modules: the batch dict and the loaders."""

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
from distill.data.mixing import Mixing, mix
from distill.data.samplers import EvaluationSampler, ResumableLoader, SampleKey, ShuffledSampler
from distill.data.sources import Source, Subset, count_classes, labels_of
from distill.errors import UserError, require_at_least
from distill.randomness import seeded_by

Split = Literal["train", "val", "test"]
Sample = dict[str, Any]
ExtraFields = Callable[[Tensor], dict[str, Tensor]]


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
        seed: of the augmentation and the order.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor]) -> None:
        self.source = source
        self.transform = transform
        self.extra_fields: ExtraFields | None = None
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # set by Lightning's seed_everything

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        draw, position = key if isinstance(key, tuple) else (0, key)
        index = position % len(self)
        image, label = self.source[index]
        with seeded_by("augmentation", self.seed, draw, index):
            image = self.transform(image)
        sample = {"image": image, "label": int(label), "index": index if index == position else -1, "draw": draw}
        return sample if self.extra_fields is None else {**sample, **self.extra_fields(image)}


class ImageData(LightningDataModule, ABC):
    """Base of the data modules: a subclass sets `num_classes` and `image_shape` and implements `samples`.

    Args:
        batch_size: images per process and step.
        num_workers: worker processes that load batches.
        mixing: mixup and CutMix of training batches.
        repetitions: how often each training image occurs in an epoch, augmented anew each time; the length of the
            epoch does not change.
        longtail: makes the training set long-tailed; the test then also reports many-, medium- and few-shot accuracy.
        class_balanced: draw training images so that all classes occur equally often, augmented anew each time; the
            length of the epoch does not change. Images without a label are not drawn.

    Attributes:
        num_classes: of the data set.
        image_shape: `(C, H, W)` of the images.
        extra_fields: computes further entries of the batch, by name, from each augmented image, in the workers.
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
        require_at_least(1, **{"data.batch_size": batch_size, "data.repetitions": repetitions})
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
        """Check the training images against batch size and sampling before a run writes anything."""
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
        """Return the samples of a split, before any `longtail`; the training split with its augmentation."""

    def class_counts(self) -> list[int]:
        """Return the number of labeled training images per class, after any `longtail`.

        Raises:
            UserError: the source of the images does not list their labels.
        """
        return count_classes(labels_of(self._cached("train").source), self.num_classes)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of shuffled, full batches that resumes where a checkpoint was saved."""
        samples = self._cached("train")
        labels = labels_of(samples.source) if self.class_balanced else None
        sampler = ShuffledSampler(
            samples, *self._ranks(), seed=samples.seed, repetitions=self.repetitions, balanced=labels
        )
        self._train_loader = ResumableLoader(
            samples, mixed=self.mixing is not None, sampler=sampler, drop_last=True, **self._settings()
        )
        self._train_loader.load_state_dict(self._resumed)
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the validation images in order; each counts once on any number of ranks."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the test images in order; each counts once on any number of ranks."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the test images."""
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training data, which Lightning stores in checkpoints."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume the training data at a stored position."""
        self._resumed = state_dict

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Mix training batches on the device."""
        if self.mixing is None or "mixing_seed" not in batch:
            return batch
        seed = batch.pop("mixing_seed")
        return mix(batch, self.num_classes, self.mixing, seed)

    def _evaluation_loader(self, split: Split) -> DataLoader[Sample]:
        samples = self._cached(split)
        return DataLoader(samples, sampler=EvaluationSampler(samples, *self._ranks()), **self._settings())

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
            "generator": torch.Generator().manual_seed(0),  # loaders must not draw from the global generator
        }
