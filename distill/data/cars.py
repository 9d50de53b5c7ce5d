"""Stanford Cars in the layout of its authors' devkit."""

from __future__ import annotations

from typing import Any

from distill.data.dataset import Split
from distill.data.image_files import first_line
from distill.data.photos import PhotoData
from distill.data.sources import FileSource
from distill.errors import UserError

_FOLDER = "stanford_cars"
_REQUIRED = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_train/"
_COPIES = "github.com/pytorch/vision/issues/7545"


class StanfordCars(PhotoData):
    """Stanford Cars: photos of 196 models of cars, 8,144 for training and 8,041 for testing.

    There are no validation images: validation uses the test images, so report the last epoch, not the best. The
    authors' page is gone, so nothing can be downloaded.

    Args:
        root: the folder that contains `stanford_cars` with `cars_train/*.jpg`, `cars_test/*.jpg`, `devkit/*.mat` and
            `cars_test_annos_withlabels.mat`.
        settings: further settings, see `PhotoData` and `ImageData`.

    Raises:
        UserError: the data are missing, incomplete or corrupt; later, a file is not an image.
    """

    num_classes = 196

    def __init__(self, root: str = "data", **settings: Any) -> None:
        super().__init__(root=root, **settings)
        missing = [name for name in _REQUIRED if not (self.root / _FOLDER / name).exists()]
        if missing:
            raise UserError(
                f"data.root: {self.root / _FOLDER} lacks {missing[0]!r}; the authors' page is gone, copies and the "
                f"layout are described in {_COPIES}"
            )

    def source(self, split: Split) -> FileSource:
        """Return the photos of a split; validation and test share one."""
        from torchvision.datasets import StanfordCars as TorchvisionCars

        try:
            cars = TorchvisionCars(str(self.root), split="train" if split == "train" else "test")
        except Exception as error:  # torchvision and scipy raise many types for incomplete files
            raise UserError(
                f"data.root: Stanford Cars in {self.root / _FOLDER} is incomplete or corrupt ({first_line(error)}): "
                f"download its .mat files and images again ({_COPIES})"
            ) from None
        return FileSource(cars._samples)
