"""STL-10 in its authors' binary files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.dataset import Split
from distill.data.small_images import SmallImageData


class STL10(SmallImageData):
    """STL-10: 96 x 96 pixels, 10 classes, 5,000 images for training, 8,000 for testing, 100,000 unlabeled.

    There are no validation images: validation uses the test images, so report the last epoch, not the best.

    Args:
        root: the folder that contains `stl10_binary`.
        image_size: side in pixels that images are resized to, at least 8; transfer results are published at 32.
        verify: verify the checksums of the files that are read.
        unlabeled: also train with the unlabeled images; they have label -1, for terms that need no label.
        settings: further settings, see `SmallImageData` and `ImageData`; the download has 2.6 GB.

    Raises:
        UserError: the data are missing, incomplete or corrupt.
    """

    num_classes = 10
    folder = "stl10_binary"
    title = "STL-10"

    def __init__(
        self,
        root: str = "data",
        image_size: int = 96,
        verify: bool = True,
        unlabeled: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(root=root, image_size=image_size, **settings)
        self.verify = verify
        self.unlabeled = unlabeled

    def prepare_data(self) -> None:
        """Download the data set if requested."""
        if self.download and not self.path.is_dir():
            self._read("train", download=True)

    def source(self, split: Split) -> Any:
        """Return the images of a split; validation and test share one."""
        if split == "train":
            return self._read("train+unlabeled" if self.unlabeled else "train")
        return self._read("test")

    def _read(self, part: str, download: bool = False) -> Any:
        import torchvision.datasets

        kind: Any = torchvision.datasets.STL10
        files: dict[str, str] = dict([*kind.train_list, *kind.test_list])
        if not download:  # skip the 2.6 GB of unlabeled images unless they are used
            files = {name: md5 for name, md5 in files.items() if name.split("_")[0] in part.split("+")}
        sums = {name: md5 if self.verify else None for name, md5 in files.items()}
        kind = type("STL10", (kind,), {"_check_integrity": lambda stl10: _intact(self.path, sums)})
        try:
            stl10 = kind(self.root, split=part, download=download)
            if len(stl10.data) != len(stl10.labels):
                raise ValueError(f"{len(stl10.data)} images and {len(stl10.labels)} labels")
        except Exception as error:  # torchvision raises many types for incomplete files
            raise self.corrupt(error) from None
        return stl10


def _intact(folder: Path, sums: dict[str, str | None]) -> bool:
    """Return whether all files exist and match the checksums that are given."""
    from torchvision.datasets.utils import check_integrity

    return all(check_integrity(str(folder / name), md5) for name, md5 in sums.items())
