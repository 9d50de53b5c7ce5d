"""Any folder of images sorted into one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.augmentation import Interpolation, TimmAugmentation, photos
from distill.data.base import ImageData, ImageDataset, Split
from distill.data.files import Files
from distill.errors import UserError


class ImageFolder(ImageData):
    """Images as `root/train/<class>/*` and `root/val/<class>/*`, the layout of ImageNet; `root/test` if there is one.

    Args:
        root: the folder that holds `train` and `val`.
        image_size: side in pixels of the square crop.
        augment: random resized crops and flips of training images, or these and what a `TimmAugmentation` adds; `false`
            takes the center crop.
        interpolation: how images are resized.
        num_workers: processes that prepare batches.
        loading: what all data modules take besides, see `ImageData`.

    Raises:
        UserError: the folder or its layout is not there; later, a file that is no image.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        augment: bool | TimmAugmentation = True,
        interpolation: Interpolation = "bilinear",
        num_workers: int = 4,
        **loading: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **loading)
        self.root = Path(root)
        self.augment = augment
        self.interpolation: Interpolation = interpolation
        self.classes = self._classes("train")
        if self._classes("val") != self.classes:
            raise UserError(f"data.root: {self.root / 'val'} has other class folders than {self.root / 'train'}")
        self.num_classes = len(self.classes)
        self.image_shape = (3, image_size, image_size)

    def samples(self, split: Split) -> ImageDataset:
        """The images of a split as `[3, side, side]` in [0, 1]."""
        from torchvision.datasets import ImageFolder as Folder

        folder = self.root / split
        if split == "test" and not folder.is_dir():
            folder = self.root / "val"
        try:
            source = Folder(str(folder))
        except FileNotFoundError as error:
            raise UserError(f"data.root: {folder} holds a class without images: {error}") from None
        augment = self.augment if split == "train" else False
        return ImageDataset(Files(source.samples), photos(self.image_shape[1], augment, self.interpolation))

    def _classes(self, split: str) -> list[str]:
        folder = self.root / split
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
        if not classes:
            raise UserError(
                f"data.root: no class folders in {folder}; sort the images as {folder}/<class>/<image> "
                "(ImageNet: from image-net.org, after registering)"
            )
        return classes
