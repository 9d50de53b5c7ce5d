"""CIFAR-10 and CIFAR-100 in their own files."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distill.data.augmentation import small_images
from distill.data.base import ImageData, ImageDataset, Split
from distill.errors import UserError

Array = NDArray[Any]


class _Cifar(ImageData, ABC):
    """60,000 color images of 32 x 32 pixels, 50,000 to train with and 10,000 to test with.

    Args:
        root: the folder that holds the extracted folder of the data set.
        download: fetch it there if it is missing.
        verify: hold the files against their checksums. They are pickles, which can run code: leave this on for files
            that you have not written yourself.
        held_out: how many of the training images are left out for validation, as many of each class. With none, as
            benchmarks have it, validation looks at the test images: then report the last epoch, not the best.
        augment: shift training images by up to 4 pixels and flip them.
        num_workers: processes that prepare batches.
        loading: what all data modules take besides, see `ImageData`.

    Raises:
        UserError: the data are not there, or `held_out` is no number of images for each class.
    """

    folder: ClassVar[str]
    title: ClassVar[str]
    classes: ClassVar[int]

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        held_out: int = 0,
        augment: bool = True,
        num_workers: int = 4,
        **loading: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **loading)
        self.num_classes = self.classes
        if not (Path(root) / self.folder).is_dir() and not download:
            raise UserError(
                f"data.root: {root!r} holds no folder {self.folder!r}: give the folder that does, or fetch "
                f"{self.title} with data.download=true"
            )
        if held_out < 0 or held_out % self.num_classes:
            raise UserError(f"data.held_out must be a multiple of the {self.num_classes} classes, given {held_out}")
        self.root = root
        self.download = download
        self.verify = verify
        self.held_out = held_out
        self.augment = augment
        self.image_shape = (3, 32, 32)

    def prepare_data(self) -> None:
        """Fetch the data set where that was asked for."""
        if self.download:
            self._read(train=True, download=True)

    def samples(self, split: Split) -> ImageDataset:
        """The images of a split as `[3, 32, 32]` in [0, 1]."""
        training = split == "train" or (split == "val" and self.held_out > 0)
        images, labels = self._read(train=training)
        if training and self.held_out:
            held = _last_of_each_class(labels, self.held_out // self.num_classes)
            images, labels = images[held == (split == "val")], labels[held == (split == "val")]
        return ImageDataset(_Pairs(images, labels), small_images(32, augment=split == "train" and self.augment))

    def _read(self, train: bool, download: bool = False) -> tuple[Array, Array]:
        import torchvision.datasets

        kind: Any = getattr(torchvision.datasets, self.title)
        if not self.verify:
            files = {key: [[name, None] for name, _ in getattr(kind, key)] for key in ("train_list", "test_list")}
            kind = type(self.title, (kind,), {**files, "meta": {**kind.meta, "md5": None}})
        try:
            source = kind(self.root, train=train, download=download)
        except Exception as error:  # torchvision raises many kinds for files that are not whole
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.root: {self.title} in {self.root!r} is incomplete or corrupt ({reason}): remove the folder "
                f"{self.folder!r} in it and fetch it anew with data.download=true"
            ) from None
        return source.data, np.array(source.targets)


class CIFAR10(_Cifar):
    """CIFAR-10: 60,000 color images of 32 x 32 pixels in 10 classes, 50,000 to train with, 10,000 to test with."""

    classes = 10
    folder = "cifar-10-batches-py"
    title = "CIFAR10"


class CIFAR100(_Cifar):
    """CIFAR-100: 60,000 color images of 32 x 32 pixels in 100 classes, 50,000 to train with, 10,000 to test with."""

    classes = 100
    folder = "cifar-100-python"
    title = "CIFAR100"


class _Pairs:
    def __init__(self, images: Array, labels: Array) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Array, int]:
        return self.images[index], int(self.labels[index])


def _last_of_each_class(labels: Array, count: int) -> Array:
    """A mask of the last `count` samples of each class."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[-count:]] = True
    return chosen
