"""CIFAR-10 and CIFAR-100 in their authors' format."""

from __future__ import annotations

from abc import ABC
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.dataset import Split
from distill.data.small_images import SmallImageData
from distill.data.sources import ArraySource
from distill.errors import UserError, require_at_least

Array = NDArray[Any]


class _CIFAR(SmallImageData, ABC):
    """60,000 color images of 32 x 32 pixels, 50,000 for training and 10,000 for testing.

    Args:
        root: the folder that contains the extracted folder of the data set.
        verify: verify the files' checksums. The files are pickles, which can run code: disable this only for files
            that you have written yourself.
        held_out: number of training images set aside for validation, equally many of each class. With 0, as in
            benchmarks, validation uses the test images: then report the last epoch, not the best.
        settings: further settings, see `SmallImageData` and `ImageData`.

    Raises:
        UserError: the data are missing, or `held_out` is not a multiple of the number of classes or leaves nothing to
            train with.
    """

    def __init__(self, root: str = "data", verify: bool = True, held_out: int = 0, **settings: Any) -> None:
        super().__init__(root=root, **settings)
        require_at_least(0, **{"data.held_out": held_out})
        if held_out % self.num_classes:
            raise UserError(f"data.held_out must be a multiple of the {self.num_classes} classes, given {held_out}")
        self.verify = verify
        self.held_out = held_out

    def prepare_data(self) -> None:
        """Download the data set if requested."""
        if self.download:
            self._read(train=True, download=True)

    def source(self, split: Split) -> ArraySource:
        """Return the images of a split, arrays `[32, 32, 3]` of bytes."""
        from_training = split == "train" or (split == "val" and self.held_out > 0)
        images, labels = self._read(train=from_training)
        if from_training and self.held_out:
            fewest = int(np.bincount(labels, minlength=self.num_classes).min())
            if self.held_out // self.num_classes >= fewest:
                raise UserError(
                    f"data.held_out is {self.held_out}, {self.held_out // self.num_classes} of each class, which "
                    f"leaves none of {fewest} to train with: give {(fewest - 1) * self.num_classes} or less"
                )
            held_out = _last_of_each_class(labels, self.held_out // self.num_classes)
            chosen = held_out if split == "val" else ~held_out
            images, labels = images[chosen], labels[chosen]
        return ArraySource(images, labels)

    def _read(self, train: bool, download: bool = False) -> tuple[Array, Array]:
        import torchvision.datasets

        kind: Any = getattr(torchvision.datasets, type(self).__name__)
        if not self.verify:
            files = {key: [[name, None] for name, _ in getattr(kind, key)] for key in ("train_list", "test_list")}
            kind = type(kind.__name__, (kind,), {**files, "meta": {**kind.meta, "md5": None}})
        try:
            cifar = kind(self.root, train=train, download=download)
        except Exception as error:  # torchvision raises many types for incomplete files
            raise self.corrupt(error) from None
        return cifar.data, np.array(cifar.targets)


class CIFAR10(_CIFAR):
    """CIFAR-10: 60,000 color images of 32 x 32 pixels in 10 classes, 50,000 for training and 10,000 for testing."""

    num_classes = 10
    folder = "cifar-10-batches-py"
    title = "CIFAR-10"


class CIFAR100(_CIFAR):
    """CIFAR-100: 60,000 color images of 32 x 32 pixels in 100 classes, 50,000 for training and 10,000 for testing."""

    num_classes = 100
    folder = "cifar-100-python"
    title = "CIFAR-100"


def _last_of_each_class(labels: Array, count: int) -> Array:
    """Return a mask of the last `count` samples of each class."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[-count:]] = True
    return mask
