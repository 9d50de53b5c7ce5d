"""Base of the data modules for small images that can be downloaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from distill.data.augmentation import small_image_transform
from distill.data.base import ImageData
from distill.data.dataset import ImageDataset, Split
from distill.data.image_files import first_line
from distill.data.sources import Source
from distill.errors import UserError, require_at_least


class SmallImageData(ImageData, ABC):
    """Base of the data modules for small images: a subclass names its folder and implements `source`.

    Args:
        root: the folder that contains the extracted folder of the data set.
        download: download it there if it is missing.
        image_size: side in pixels that images are resized to, at least 8.
        augment: shift training images by up to an eighth of the side and flip them.
        num_workers: worker processes that load batches.
        settings: further settings, see `ImageData`.

    Attributes:
        folder: name of the extracted folder.
        title: name of the data set in messages.
        origin: further ways to get the data, for the message that they are missing.

    Raises:
        UserError: the data are missing and not to be downloaded.
    """

    folder: ClassVar[str]
    title: ClassVar[str]
    origin: ClassVar[str] = ""

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        image_size: int = 32,
        augment: bool = True,
        num_workers: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **settings)
        require_at_least(8, **{"data.image_size": image_size})
        self.root = root
        self.path = Path(root) / self.folder
        if not self.is_there() and not download:
            raise UserError(
                f"data.root: {root!r} has no folder {self.folder!r}: give the folder that does, or download "
                f"{self.title} with data.download=true{self.origin}"
            )
        self.download = download
        self.augment = augment
        self.image_shape = (3, image_size, image_size)

    def is_there(self) -> bool:
        """Return whether `root` contains the data set."""
        return self.path.is_dir()

    @abstractmethod
    def source(self, split: Split) -> Source:
        """Return the images of a split, as `small_image_transform` takes them, with their labels."""

    def samples(self, split: Split) -> ImageDataset:
        """Return the images of a split as `[3, side, side]` in [0, 1]."""
        augment = split == "train" and self.augment
        return ImageDataset(self.source(split), small_image_transform(self.image_shape[1], augment))

    def corrupt(self, error: Exception) -> UserError:
        """Return the error that reports files which cannot be read."""
        return UserError(
            f"data.root: {self.title} in {self.root!r} is incomplete or corrupt ({first_line(error)}): remove the "
            f"folder {self.folder!r} in it and download it again with data.download=true"
        )
