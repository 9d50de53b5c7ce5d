"""Stanford Cars as its authors' devkit describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.data.augmentation import Interpolation, TimmAugmentation, photos
from distill.data.base import ImageData, ImageDataset, Split
from distill.data.files import Files
from distill.errors import UserError

_FOLDER = "stanford_cars"
_WANTED = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_train/"


class StanfordCars(ImageData):
    """Stanford Cars: photos of 196 models of cars, 8,144 to train with and 8,041 to test with.

    It has no validation images: validation looks at the test images, so report the last epoch, not the best. Its
    authors' page is gone, so nothing can be downloaded from here.

    Args:
        root: the folder that holds `stanford_cars`, with `cars_train/*.jpg`, `cars_test/*.jpg`, `devkit/*.mat` and
            `cars_test_annos_withlabels.mat` in it.
        image_size: side in pixels of the square crop.
        augment: random resized crops and flips of training images, or these and what a `TimmAugmentation` adds; `false`
            takes the center crop.
        interpolation: how images are resized.
        num_workers: processes that prepare batches.
        loading: what all data modules take besides, see `ImageData`.

    Raises:
        UserError: the data are not there, incomplete or corrupt; later, a file that is no image.
    """

    def __init__(
        self,
        root: str = "data",
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
        self.num_classes = 196
        self.image_shape = (3, image_size, image_size)
        missing = [name for name in _WANTED if not (self.root / _FOLDER / name).exists()]
        if missing:
            raise UserError(
                f"data.root: {self.root / _FOLDER} lacks {missing[0]!r}; the authors' page is gone, copies and the "
                "layout are in github.com/pytorch/vision/issues/7545"
            )

    def samples(self, split: Split) -> ImageDataset:
        """The images of a split as `[3, side, side]` in [0, 1]."""
        from torchvision.datasets import StanfordCars as Torchvisions

        try:
            source = Torchvisions(str(self.root), split="train" if split == "train" else "test")
        except Exception as error:  # torchvision and scipy raise many kinds for files that are not whole
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.root: Stanford Cars in {self.root / _FOLDER} is incomplete or corrupt ({reason}): get its .mat "
                "files and images anew (github.com/pytorch/vision/issues/7545)"
            ) from None
        augment = self.augment if split == "train" else False
        return ImageDataset(Files(source._samples), photos(self.image_shape[1], augment, self.interpolation))
