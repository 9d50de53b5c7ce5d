"""Tiny-ImageNet-200, as distributed or with its validation images sorted by class."""

from __future__ import annotations

from typing import Any

from distill.data.class_folders import class_files, class_folders, listed, notes_on, refuse_unknown_classes
from distill.data.dataset import Split
from distill.data.image_files import first_line
from distill.data.small_images import SmallImageData
from distill.data.sources import FileSource
from distill.errors import UserError

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_EXTENSIONS = (".jpeg", ".jpg", ".png")


class TinyImageNet(SmallImageData):
    """Tiny-ImageNet: 200 classes, 100,000 images of 64 x 64 pixels for training and 10,000 for testing.

    Two layouts are read: `val/images/*` with labels in `val/val_annotations.txt`, as distributed, and validation
    images sorted into class folders, `val/<class>/*` or `val/<class>/images/*`. The labels of the test images were
    never published: validation and test both use the validation images.

    Args:
        root: the folder that contains `tiny-imagenet-200`.
        image_size: side in pixels that images are resized to, at least 8; transfer results are published at 32.
        settings: further settings, see `SmallImageData` and `ImageData`.

    Raises:
        UserError: the data are missing or have another layout, or the download is corrupt; later, a file is not an
            image.
    """

    num_classes = 200
    folder = "tiny-imagenet-200"
    title = "Tiny-ImageNet"

    def __init__(self, root: str = "data", image_size: int = 64, **settings: Any) -> None:
        super().__init__(root=root, image_size=image_size, **settings)

    def prepare_data(self) -> None:
        """Download the data set if requested."""
        if not self.download or self.path.is_dir():
            return
        from torchvision.datasets.utils import download_and_extract_archive

        try:
            download_and_extract_archive(_URL, self.root, md5=_MD5)
        except Exception as error:  # of the network, the disk, or an incomplete archive
            raise UserError(
                f"data.download: {_URL} could not be downloaded to {self.root!r} ({first_line(error)}): remove what "
                "there is of it and try again"
            ) from None

    def source(self, split: Split) -> FileSource:
        """Return the images of a split; validation and test share one."""
        classes = self._classes()
        if split == "train":
            return self._sorted("train", classes)
        if not set(classes).isdisjoint(class_folders(self.path / "val")):
            refuse_unknown_classes(self.path / "val", self.path / "train", allowed=["images"])
            return self._sorted("val", classes)
        return FileSource(self._annotated(classes))

    def _classes(self) -> list[str]:
        folder = self.path / "train"
        classes = class_folders(folder)
        if len(classes) != self.num_classes:
            raise UserError(
                f"data.root: {folder} has {len(classes)} class folders, not the {self.num_classes} of Tiny-ImageNet: "
                f"remove {self.path} and download it again with data.download=true"
            )
        return classes

    def _sorted(self, part: str, classes: list[str]) -> FileSource:
        """Return the images in class folders."""
        folder = self.path / part
        samples, left_out = class_files(folder, classes, _EXTENSIONS)
        left_out.pop(".txt", None)  # the bounding boxes of each class
        present = {label for _, label in samples}
        if missing := [name for label, name in enumerate(classes) if label not in present]:
            raise UserError(f"data.root: {folder} lacks images: there are none of {listed(missing)}")
        return FileSource(samples, notes_on(folder, classes, present, left_out))

    def _annotated(self, classes: list[str]) -> list[tuple[str, int]]:
        """Return the files whose labels are in `val_annotations.txt`, with these labels."""
        table = self.path / "val" / "val_annotations.txt"
        if not table.is_file():
            raise UserError(
                f"data.root: {self.path / 'val'} has neither val_annotations.txt nor the class folders of "
                f"{self.path / 'train'}: remove {self.path} and download it again with data.download=true"
            )
        labels = {name: label for label, name in enumerate(classes)}
        files = []
        for number, line in enumerate(table.read_text(errors="replace").splitlines(), start=1):
            name, *rest = line.split("\t")
            if not rest or rest[0] not in labels:
                raise UserError(f"data.root: line {number} of {table} names no image and class of the data set")
            files.append((str(table.parent / "images" / name), labels[rest[0]]))
        if not files:
            raise UserError(f"data.root: {table} is empty: download the data set again with data.download=true")
        return files
