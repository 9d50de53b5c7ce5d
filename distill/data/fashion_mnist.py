"""Fashion-MNIST in its authors' format, or as Debian installs it."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from distill.data.dataset import Split
from distill.data.held_out import divide, require_fraction
from distill.data.image_files import first_line
from distill.data.small_images import SmallImageData
from distill.data.sources import ArraySource
from distill.errors import UserError, require_at_least
from distill.randomness import derive_seed

_FILES = {"train": "train", "val": "train", "test": "t10k"}


class FashionMNIST(SmallImageData):
    """Fashion-MNIST: 60,000 + 10,000 gray pictures of clothes, 28 x 28 pixels in 10 classes, in three channels.

    Validation images are held out of the 60,000. Which images these are, which ones `train_size` keeps and which ones
    keep a label depends on the images' numbers alone, not on a seed; smaller choices are part of larger ones.

    Args:
        root: the folder that contains the four idx files, as they are or as `.gz` (as in Debian's package
            dataset-fashion-mnist), or torchvision's folder `FashionMNIST/raw` with them.
        val_fraction: share of the training images that is held out for validation.
        train_size: number of images to train with, of those that are not held out; `None` keeps all.
        labels_per_class: number of training images per class that keep their label; the others get label -1, for
            terms that need no label. `None` keeps all labels.
        labeled_only: leave the images without a label out of the training set.
        image_size: side in pixels that images are resized to, at least 8.
        settings: further settings, see `SmallImageData` and `ImageData`; the download has 30 MB.

    Raises:
        UserError: the data are missing, incomplete or corrupt, or a number is out of range.
    """

    num_classes = 10
    gray = True
    folder = "FashionMNIST"
    title = "Fashion-MNIST"
    origin = (
        ", or install Debian's package with 'apt-get install dataset-fashion-mnist' and give the folder of its four "
        ".gz files, which 'dpkg -L dataset-fashion-mnist' lists"
    )

    def __init__(
        self,
        root: str = "data",
        val_fraction: float = 0.1,
        train_size: int | None = None,
        labels_per_class: int | None = None,
        labeled_only: bool = False,
        image_size: int = 28,
        **settings: Any,
    ) -> None:
        super().__init__(root=root, image_size=image_size, **settings)
        require_fraction(val_fraction)
        require_at_least(1, **{"data.train_size": train_size, "data.labels_per_class": labels_per_class})
        if labels_per_class is not None and self.longtail is not None:
            raise UserError(
                f"data.labels_per_class {labels_per_class} and data.longtail both set the labels of each class: give "
                "one of them"
            )
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.labels_per_class = labels_per_class
        self.labeled_only = labeled_only

    def is_there(self) -> bool:
        return self._file("train", "images-idx3") is not None

    def prepare_data(self) -> None:
        """Download the data set if requested."""
        import torchvision.datasets

        if self.download and not self.is_there():
            try:
                torchvision.datasets.FashionMNIST(self.root, download=True)
            except Exception as error:  # torchvision and urllib raise many types
                raise self.corrupt(error) from None

    def source(self, split: Split) -> ArraySource:
        """Return the images of a split, tensors `[3, 28, 28]` of bytes."""
        from torchvision.datasets.mnist import read_image_file, read_label_file

        images = self._read(read_image_file, _FILES[split], "images-idx3")
        labels = self._read(read_label_file, _FILES[split], "labels-idx1").tolist()
        if len(images) != len(labels):
            raise self.corrupt(ValueError(f"{len(images)} images and {len(labels)} labels"))
        if split == "test":
            return _pictures(images, labels, range(len(labels)))
        training, held_out = divide(range(len(labels)), self.val_fraction)
        if split == "val":
            return _pictures(images, labels, held_out)
        chosen = sorted(training, key=lambda index: derive_seed("subset", index))
        if self.train_size is not None:
            if self.train_size > len(chosen):
                raise UserError(
                    f"data.train_size is {self.train_size}, more than the {len(chosen)} images that are not held out "
                    f"for validation: give {len(chosen)} or less, or null for all"
                )
            chosen = chosen[: self.train_size]
        if self.labels_per_class is not None:
            labeled = self._labeled(chosen, labels)
            labels = [label if index in labeled else -1 for index, label in enumerate(labels)]
            chosen = [index for index in chosen if labels[index] >= 0] if self.labeled_only else chosen
        return _pictures(images, labels, sorted(chosen))

    def corrupt(self, error: Exception) -> UserError:
        return UserError(
            f"data.root: {self.title} in {self.root!r} is incomplete or corrupt ({first_line(error)}): remove its idx "
            "files and download them again with data.download=true, or install Debian's package again"
        )

    def _labeled(self, chosen: list[int], labels: list[int]) -> set[int]:
        """Return the first images of each class."""
        assert self.labels_per_class is not None
        counts: Counter[int] = Counter()
        labeled = set()
        for index in chosen:
            counts[labels[index]] += 1
            if counts[labels[index]] <= self.labels_per_class:
                labeled.add(index)
        fewest = min(range(self.num_classes), key=lambda label: counts[label])
        if counts[fewest] < self.labels_per_class:
            raise UserError(
                f"data.labels_per_class is {self.labels_per_class}, more than the {counts[fewest]} training images of "
                f"class {fewest}: give {counts[fewest]} or less, or null for all labels"
            )
        return labeled

    def _file(self, part: str, content: str) -> Path | None:
        """Return the path of a file, or `None` if it is missing."""
        for folder in (Path(self.root), self.path / "raw"):
            for ending in ("", ".gz"):
                if (file := folder / f"{part}-{content}-ubyte{ending}").is_file():
                    return file
        return None

    def _read(self, reader: Any, part: str, content: str) -> Tensor:
        """Read a file by a reader of torchvision, which takes no `.gz`."""
        file = self._file(part, content)
        try:
            if file is None:
                raise FileNotFoundError(f"{part}-{content}-ubyte is missing")
            if file.suffix != ".gz":
                return reader(str(file))  # type: ignore[no-any-return]  # torchvision has no types
            with TemporaryDirectory() as folder:
                with gzip.open(file) as packed, open(Path(folder) / "idx", "wb") as plain:
                    shutil.copyfileobj(packed, plain)
                return reader(str(Path(folder) / "idx"))  # type: ignore[no-any-return]
        except Exception as error:  # torchvision and gzip raise many types for broken files
            raise self.corrupt(error) from None


def _pictures(images: Tensor, labels: list[int], positions: Any) -> ArraySource:
    """Return gray images `[N, 28, 28]` in three channels, with their labels."""
    chosen = list(positions)
    return ArraySource(images[chosen].unsqueeze(1).expand(-1, 3, -1, -1), [labels[index] for index in chosen])
