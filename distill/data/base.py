"""Base of all data modules: the batch dict and the loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it
from torch.utils.data import DataLoader

from distill.configurable import Configurable
from distill.data.augmentation import Interpolation, in_unit_range
from distill.data.dataset import ExtraFields, ImageDataset, Sample, Split, StoredRows, ViewKey, run_seed
from distill.data.longtail import LongTail
from distill.data.mixing import Mixing, mix
from distill.data.samplers import EvaluationSampler, FixedSampler, ResumableLoader, SampleKey, ShuffledSampler
from distill.data.sources import (
    Source,
    Subset,
    count_classes,
    labels_of,
    require_classes,
    require_images_of_every_class,
)
from distill.data.views import View, require_views, view_transforms
from distill.errors import UserError, require_at_least

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class ImageData(Configurable, LightningDataModule, ABC):
    """Base of the data modules: a subclass sets `num_classes` and `image_shape` and implements `samples`.

    Args:
        batch_size: images per process and step, whatever the number of their views.
        num_workers: worker processes that load batches.
        mixing: mixup and CutMix of training batches.
        repetitions: how often each training image occurs in an epoch, augmented anew each time; the length of the
            epoch does not change.
        longtail: makes the training set long-tailed; the test then also reports many-, medium- and few-shot accuracy.
        class_balanced: draw training images so that all classes occur equally often, augmented anew each time; the
            length of the epoch does not change. Images without a label are not drawn.
        draws: number of fixed augmented versions of each training image over the run, which repeat in turn; `None`:
            every draw is a new one.
        train_views: how each training image comes, in one view or in several: `weak` (the data's own augmentation),
            `strong` (RandAugment after it), or a `RandAugment` or `TimmAugmentation` of one's own; by default `[weak]`.
            A batch holds view after view, each image once in each.
        drop_last: leave out the images at the end of an epoch that do not fill a batch. Without it, they are a smaller
            batch, whose mean loss is a step of its own (or a share of an accumulated step) like any other; the number
            of training images must then be a multiple of the number of processes.
        seed: of the augmentation; `None`: the run's. With one of its own, runs of several seeds see the same `draws`.

    Attributes:
        num_classes: of the data set; 0 for images without labels, whose label is -1.
        image_shape: `(C, H, W)` of the images.
        classes: names of the classes, in the order of their labels; `None` where the data do not tell. They are saved
            in checkpoints, which are refused with data whose labels mean other classes.
        gray: whether the images are gray though they have three channels, so that colors are not augmented.
        extra_fields: computes further entries of the batch, by name, from each augmented image, in the workers.
        stored: by split, returns what is stored of samples, by draw and index, for the entry `stored` of the batch.

    Raises:
        UserError: a number is out of range.
    """

    num_classes: int
    classes: list[str] | None = None
    image_shape: tuple[int, int, int]
    gray: ClassVar[bool] = False
    extra_fields: ExtraFields | None = None

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        mixing: Mixing | None = None,
        repetitions: int = 1,
        longtail: LongTail | None = None,
        class_balanced: bool = False,
        drop_last: bool = True,
        draws: int | None = None,
        seed: int | None = None,
        train_views: list[View] | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, **{"data.batch_size": batch_size, "data.repetitions": repetitions, "data.draws": draws})
        require_at_least(0, **{"data.num_workers": num_workers})
        if class_balanced and repetitions > 1:
            raise UserError(
                f"data.class_balanced repeats the images of rare classes by itself: give data.repetitions 1 with it, "
                f"not {repetitions}"
            )
        if draws is not None and repetitions > draws:
            raise UserError(
                f"data.repetitions is {repetitions}, more than the {draws} data.draws, so that an epoch would repeat a "
                f"version: give {draws} or less"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.mixing = mixing
        self.repetitions = repetitions
        self.longtail = longtail
        self.class_balanced = class_balanced
        self.drop_last = drop_last
        self.draws = draws
        self.seed = seed
        self.train_views = require_views(train_views)
        self.stored: dict[Split, StoredRows] = {}
        self._samples: dict[Split, ImageDataset] = {}
        self._train_loader: ResumableLoader | None = None
        self._resumed: dict[str, Any] = {}
        self._told: set[str] = set()

    def setup(self, stage: str) -> None:
        """Check the training images against batch size, classes and sampling before a run writes anything."""
        if stage != "fit":
            return
        self._resumed = {}  # of an earlier run; a checkpoint of this one is loaded later
        ranks, _ = self._ranks()
        count = len(self._cached("train"))
        if self.drop_last and count // ranks < self.batch_size:
            shared = f" of each of {ranks} processes" if ranks > 1 else ""
            fitting = f"give {count // ranks} or less" if count >= ranks else "there is none to train with"
            raise UserError(
                f"data.batch_size is {self.batch_size}, more than the {count // ranks} training images{shared}: "
                f"{fitting}"
            )
        if not self.drop_last and count % ranks:
            raise UserError(
                f"data.drop_last is false, but the {count} training images cannot be dealt evenly to {ranks} "
                f"processes: {count % ranks} would be left over; give a number of processes that divides {count}, or "
                "drop_last true"
            )
        if self.num_classes == 0 and (self.class_balanced or self.longtail is not None):
            key = "class_balanced" if self.class_balanced else "longtail"
            raise UserError(f"data.{key} needs labels, but the images have none: leave it out")
        if self.class_balanced:
            require_images_of_every_class("data.class_balanced draws from every class", self.class_counts())

    @abstractmethod
    def samples(self, split: Split) -> ImageDataset:
        """Return the samples of a split, before any `longtail`; the training split with its augmentation."""

    def used_samples(self, split: Split) -> ImageDataset:
        """Return the samples of a split after any `longtail`, in one view; the training split with its augmentation.

        Raises:
            UserError: a label is no class.
        """
        samples = self.samples(split)
        if self.num_classes:
            require_classes(samples.source, split, self.num_classes)
        for note in getattr(samples.source, "notes", ()):
            if note not in self._told:
                rank_zero_warn(note)
            self._told.add(note)
        if split == "train" and self.longtail is not None:
            samples.source = Subset(samples.source, self.longtail.positions(samples.source, self.num_classes))
        return samples

    def used_source(self, split: Split) -> Source:
        """Return the images of a split as the loaders serve them, before their transform and after any `longtail`."""
        return self._cached(split).source

    @property
    def notes(self) -> list[str]:
        """Notes about the files of the splits that were used so far."""
        return sorted(self._told)

    def class_counts(self) -> list[int]:
        """Return the number of labeled training images per class, after any `longtail`.

        Raises:
            UserError: the source of the images does not list their labels.
        """
        return count_classes(labels_of(self._cached("train").source), self.num_classes)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of shuffled batches that resumes where a checkpoint was saved.

        With the trainer's `overfit_batches`, all epochs are the first one, in order and augmentation.
        """
        samples = self._cached("train")
        labels = labels_of(samples.source) if self.class_balanced else None
        is_fixed = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Lightning has it
        sampler = (FixedSampler if is_fixed else ShuffledSampler)(
            samples,
            *self._ranks(),
            seed=run_seed(),
            repetitions=self.repetitions,
            balanced=labels,
            draws=self.draws,
        )
        self._train_loader = ResumableLoader(
            self._served(samples),
            mixed=self.mixing is not None,
            sampler=sampler,
            drop_last=self.drop_last,
            **self._settings(),
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

    def keyed_dataloader(self, split: Split, keys: Sequence[SampleKey | ViewKey]) -> DataLoader[Sample]:
        """Return a loader of the samples of a split with the given draws and indices (and views), in their order."""
        return DataLoader(self._cached(split), sampler=keys, **self._settings())

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data and the names of the classes, for Lightning's checkpoints."""
        position: dict[str, Any] = {} if self._train_loader is None else self._train_loader.state_dict()
        return position if self.classes is None else {**position, "classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the training data at a stored position.

        Raises:
            UserError: the labels of the checkpoint mean other classes.
        """
        saved = state_dict.get("classes")
        if saved is not None and self.classes is not None and saved != self.classes:
            pairs = enumerate(zip_longest(saved, self.classes))
            label, (before, now) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
            raise UserError(
                f"data.root: class {label} is {now!r} here, but was {before!r} in the training of the checkpoint, of "
                f"{len(saved)} classes: give the data that it was trained with, or only its weights as "
                "model.student.weights"
            )
        self._resumed = state_dict

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Turn bytes into floats on the device, and mix training batches there."""
        if isinstance(batch, dict) and isinstance(batch.get("image"), torch.Tensor):
            batch["image"] = in_unit_range(batch["image"]) if batch["image"].dtype == torch.uint8 else batch["image"]
        if self.mixing is None or "mixing_seed" not in batch:
            return batch
        seed = batch.pop("mixing_seed")
        return mix(batch, self.num_classes, self.mixing, seed, len(self.train_views))

    def _evaluation_loader(self, split: Split) -> DataLoader[Sample]:
        samples = self._cached(split)
        sampler = EvaluationSampler(samples, *self._ranks())
        return DataLoader(self._served(samples), sampler=sampler, **self._settings())

    @property
    def has_own_hooks(self) -> bool:
        """Whether a subclass has hooks of its own on the way of a batch to the device."""
        return any(getattr(type(self), name) is not getattr(ImageData, name) for name in _TRANSFER_HOOKS)

    def _served(self, samples: ImageDataset) -> ImageDataset:
        """Return samples as the loaders serve them: in bytes while a trainer runs, whose hooks make floats of them.

        Other hooks, which may see the images before, expect floats.
        """
        if self.trainer is None or self.trainer.state.stage is None:
            return samples
        is_seen = self.has_own_hooks or is_overridden(_TRANSFER_HOOKS[0], self.trainer.lightning_module)
        return samples if is_seen else samples.as_bytes()

    def _cached(self, split: Split) -> ImageDataset:
        if split not in self._samples:
            samples = self.used_samples(split)
            if split == "train" and self.train_views != ("weak",):
                channels, side, _ = self.image_shape
                interpolation: Interpolation = getattr(self, "interpolation", "bilinear")
                gray = self.gray or channels == 1
                samples.views = view_transforms(self.train_views, samples.transform, side, interpolation, gray)
            self._samples[split] = samples
        self._samples[split].seed = run_seed() if self.seed is None else self.seed
        self._samples[split].extra_fields = self.extra_fields
        self._samples[split].stored = self.stored.get(split)
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
