"""Image folders with one subfolder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.base import Split
from distill.data.photos import PhotoData
from distill.data.sources import FileSource
from distill.errors import UserError


class ImageFolder(PhotoData):
    """Images as `root/train/<class>/*` and `root/val/<class>/*`, ImageNet's layout; `root/test` is optional.

    Args:
        root: the folder that contains `train` and `val`; without `test`, the validation images are the test images.
        settings: further settings, see `PhotoData` and `ImageData`.

    Raises:
        UserError: the folder is missing or has another layout; later, a file is not an image.
    """

    def __init__(self, root: str, **settings: Any) -> None:
        super().__init__(root=root, **settings)
        self.classes = class_folders(self.root / "train")
        if not self.classes:
            raise _no_classes(self.root / "train")
        if not (val := class_folders(self.root / "val")):
            raise _no_classes(self.root / "val")
        if val != self.classes:
            raise UserError(f"data.root: {self.root / 'val'} has other class folders than {self.root / 'train'}")
        self.num_classes = len(self.classes)

    def source(self, split: Split) -> FileSource:
        """Return the images of a split."""
        from torchvision.datasets import ImageFolder as TorchvisionFolder

        folder = self.root / split
        if split == "test" and not folder.is_dir():
            folder = self.root / "val"
        try:
            return FileSource(TorchvisionFolder(str(folder)).samples)
        except FileNotFoundError as error:
            raise UserError(f"data.root: {folder} has a class without images: {error}") from None


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders; none if `folder` does not exist."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _no_classes(folder: Path) -> UserError:
    return UserError(
        f"data.root: no class folders in {folder}; sort the images as {folder}/<class>/<image> "
        "(ImageNet: from image-net.org, after registering)"
    )
