"""Tiny-ImageNet-200, as it is distributed and re-sorted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.augmentation import small_images
from distill.data.base import ImageData, ImageDataset, Split
from distill.data.files import Files
from distill.errors import UserError

_FOLDER = "tiny-imagenet-200"
_CLASSES = 200
_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_ENDINGS = (".jpeg", ".jpg", ".png")


class TinyImageNet(ImageData):
    """Tiny-ImageNet: 200 classes, 100,000 images of 64 x 64 pixels to train with and 10,000 to test with.

    Both layouts are read: `val/images/*` with their labels in `val/val_annotations.txt`, as it is distributed, and
    validation images that were sorted into folders of classes since, `val/<class>/*` or `val/<class>/images/*`. The
    labels of its test images were never published: the validation images are the test.

    Args:
        root: the folder that holds `tiny-imagenet-200`.
        download: fetch it there if it is missing.
        image_size: side in pixels that images are resized to; transfer is published at 32.
        augment: shift training images by up to an eighth of the side and flip them.
        num_workers: processes that prepare batches.
        loading: what all data modules take besides, see `ImageData`.

    Raises:
        UserError: the data are not there or of another layout, or the download is corrupt; later, a file that is no
            image.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        image_size: int = 64,
        augment: bool = True,
        num_workers: int = 4,
        **loading: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **loading)
        if image_size < 8:
            raise UserError(f"data.image_size must be at least 8, given {image_size}")
        self.folder = Path(root) / _FOLDER
        if not self.folder.is_dir() and not download:
            raise UserError(
                f"data.root: {root!r} holds no folder {_FOLDER!r}: give the folder that does, or fetch it with "
                "data.download=true"
            )
        self.download = download
        self.augment = augment
        self.num_classes = _CLASSES
        self.image_shape = (3, image_size, image_size)

    def prepare_data(self) -> None:
        """Fetch the data set where that was asked for."""
        if not self.download or self.folder.is_dir():
            return
        from torchvision.datasets.utils import download_and_extract_archive

        try:
            download_and_extract_archive(_URL, str(self.folder.parent), md5=_MD5)
        except Exception as error:  # of the network, the disk, or an archive that is not whole
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.download: {_URL} could not be fetched to {str(self.folder.parent)!r} ({reason}): remove what "
                "there is of it and try again"
            ) from None

    def samples(self, split: Split) -> ImageDataset:
        """The images of a split as `[3, side, side]` in [0, 1]."""
        classes = self._classes()
        if split == "train":
            files = self._sorted("train", classes)
        elif any((self.folder / "val" / name).is_dir() for name in classes):
            files = self._sorted("val", classes)
        else:
            files = self._annotated(classes)
        return ImageDataset(Files(files), small_images(self.image_shape[1], augment=split == "train" and self.augment))

    def _classes(self) -> list[str]:
        folder = self.folder / "train"
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        if len(classes) != _CLASSES:
            raise UserError(
                f"data.root: {folder} has {len(classes)} class folders, not the {_CLASSES} of Tiny-ImageNet: remove "
                f"{self.folder} and fetch it anew with data.download=true"
            )
        return classes

    def _sorted(self, part: str, classes: list[str]) -> list[tuple[str, int]]:
        """The files below one folder a class."""
        from torchvision.datasets.folder import make_dataset

        labels = {name: label for label, name in enumerate(classes)}
        try:
            files: list[tuple[str, int]] = make_dataset(str(self.folder / part), labels, extensions=_ENDINGS)
        except FileNotFoundError as error:
            raise UserError(f"data.root: {self.folder / part} lacks images: {str(error).splitlines()[0]}") from None
        return files

    def _annotated(self, classes: list[str]) -> list[tuple[str, int]]:
        """The files in one folder, whose labels are in a table."""
        table = self.folder / "val" / "val_annotations.txt"
        if not table.is_file():
            raise UserError(
                f"data.root: {self.folder / 'val'} has neither val_annotations.txt nor the class folders of "
                f"{self.folder / 'train'}: remove {self.folder} and fetch it anew with data.download=true"
            )
        labels = {name: label for label, name in enumerate(classes)}
        files = []
        for number, line in enumerate(table.read_text().splitlines(), start=1):
            name, *rest = line.split("\t")
            if not rest or rest[0] not in labels:
                raise UserError(f"data.root: line {number} of {table} names no image and class of the data set")
            files.append((str(table.parent / "images" / name), labels[rest[0]]))
        if not files:
            raise UserError(f"data.root: {table} is empty: fetch the data set anew with data.download=true")
        return files
