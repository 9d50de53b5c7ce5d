"""STL-10 in its own binary files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.augmentation import small_images
from distill.data.base import ImageData, ImageDataset, Split
from distill.errors import UserError

_FOLDER = "stl10_binary"


class STL10(ImageData):
    """STL-10: 96 x 96 pixels, 10 classes, 5,000 images to train with, 8,000 to test with, 100,000 without a label.

    It has no validation images: validation looks at the test images, so report the last epoch, not the best.

    Args:
        root: the folder that holds `stl10_binary`.
        download: fetch it there if it is missing (2.6 GB).
        verify: hold the files that are read against their checksums.
        unlabeled: train with the images that have no label too; they come with label -1, for terms that need none.
        image_size: side in pixels that images are resized to; transfer is published at 32.
        augment: shift training images by up to an eighth of the side and flip them.
        num_workers: processes that prepare batches.
        loading: what all data modules take besides, see `ImageData`.

    Raises:
        UserError: the data are not there, incomplete or corrupt.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        unlabeled: bool = False,
        image_size: int = 96,
        augment: bool = True,
        num_workers: int = 4,
        **loading: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **loading)
        if image_size < 8:
            raise UserError(f"data.image_size must be at least 8, given {image_size}")
        if not (Path(root) / _FOLDER).is_dir() and not download:
            raise UserError(
                f"data.root: {root!r} holds no folder {_FOLDER!r}: give the folder that does, or fetch STL-10 with "
                "data.download=true"
            )
        self.root = root
        self.download = download
        self.verify = verify
        self.unlabeled = unlabeled
        self.augment = augment
        self.num_classes = 10
        self.image_shape = (3, image_size, image_size)

    def prepare_data(self) -> None:
        """Fetch the data set where that was asked for."""
        if self.download and not (Path(self.root) / _FOLDER).is_dir():
            self._read("train", download=True)

    def samples(self, split: Split) -> ImageDataset:
        """The images of a split as `[3, side, side]` in [0, 1]."""
        if split == "train":
            source = self._read("train+unlabeled" if self.unlabeled else "train")
        else:
            source = self._read("test")
        return ImageDataset(source, small_images(self.image_shape[1], augment=split == "train" and self.augment))

    def _read(self, part: str, download: bool = False) -> Any:
        import torchvision.datasets

        kind: Any = torchvision.datasets.STL10
        files: dict[str, str] = dict([*kind.train_list, *kind.test_list])
        if not download:  # no checksum of 2.6 GB without a label that nobody has asked for
            files = {name: md5 for name, md5 in files.items() if name.split("_")[0] in part.split("+")}
        sums = {name: md5 if self.verify else None for name, md5 in files.items()}
        kind = type("STL10", (kind,), {"_check_integrity": lambda source: _intact(Path(source.root) / _FOLDER, sums)})
        try:
            source = kind(self.root, split=part, download=download)
            if len(source.data) != len(source.labels):
                raise ValueError(f"{len(source.data)} images and {len(source.labels)} labels")
        except Exception as error:  # torchvision raises many kinds for files that are not whole
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.root: STL-10 in {self.root!r} is incomplete or corrupt ({reason}): remove the folder "
                f"{_FOLDER!r} in it and fetch it anew with data.download=true"
            ) from None
        return source


def _intact(folder: Path, sums: dict[str, str | None]) -> bool:
    """Whether all files are there, and whole where a checksum is given."""
    from torchvision.datasets.utils import check_integrity

    return all(check_integrity(str(folder / name), md5) for name, md5 in sums.items())
