"""Image folders with one subfolder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.base import Split
from distill.data.class_folders import (
    class_files,
    class_folders,
    listed,
    notes_on,
    notes_on_names,
    refuse_unknown_classes,
)
from distill.data.photos import PhotoData
from distill.data.sources import FileSource
from distill.errors import UserError


class ImageFolder(PhotoData):
    """Images as `root/train/<class>/*` and `root/val/<class>/*`, ImageNet's layout; `root/test` is optional.

    The sorted class folders of the training images number the classes of all splits. A class may be missing in the
    others, which is noted. Hidden files and folders are ignored.

    Args:
        root: the folder that contains `train` and `val`; without `test`, the validation images are the test images.
        settings: further settings, see `PhotoData` and `ImageData`.

    Attributes:
        classes: their names, in the order of their labels.

    Raises:
        UserError: the folder is missing or has another layout, a class has no training image, or another split has a
            class that the training images do not have; later, a file is not an image.
    """

    def __init__(self, root: str, **settings: Any) -> None:
        super().__init__(root=root, **settings)
        self.classes: list[str] = class_folders(self.root / "train")
        for split in ("train", "val"):
            if not class_folders(self.root / split):
                raise _no_classes(self.root / split)
        for split in ("val", "test"):
            refuse_unknown_classes(self.root / split, self.root / "train")
        self.num_classes = len(self.classes)

    def source(self, split: Split) -> FileSource:
        """Return the images of a split."""
        folder = self.root / split
        if split == "test" and not folder.is_dir():
            folder = self.root / "val"
        if not class_folders(folder):
            raise _no_classes(folder)
        samples, left_out = class_files(folder, self.classes)
        labels = {label for _, label in samples}
        missing = [name for label, name in enumerate(self.classes) if label not in labels]
        if missing and (split == "train" or not samples):
            files = f", only files of other kinds ({', '.join(left_out)})" if left_out else ""
            raise UserError(f"data.root: {folder} has no image of {listed(missing)}{files}")
        notes = notes_on(folder, self.classes, labels, left_out)
        return FileSource(samples, [*notes, *(notes_on_names(folder, self.classes) if split == "train" else [])])


def _no_classes(folder: Path) -> UserError:
    return UserError(
        f"data.root: no class folders in {folder}; sort the images as {folder}/<class>/<image> "
        "(ImageNet: from image-net.org, after registering)"
    )
