"""scikit-learn's handwritten digits: 1,797 real scans that need no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distill.data.base import ImageData
from distill.data.dataset import ImageDataset, Split
from distill.data.sources import ArraySource
from distill.errors import UserError, require_at_least

_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
_SPLIT_SEED = 0  # the split is part of the data set: the same in every run


class Digits(ImageData):
    """Handwritten digits of scikit-learn (8 x 8 scans, ten classes), resized, in three channels.

    The split is fixed and stratified: 1,078 training, 270 validation and 449 test images.

    Args:
        labels_per_class: number of training images per class that keep their label; the others get label -1, for
            terms that need no label. `None` keeps all labels.
        labeled_only: leave the images without a label out of the training set.
        image_size: side in pixels.
        augment: rotate (10 degrees), shift (a tenth of the side) and scale (0.9 to 1.1) training images.
        settings: further settings, see `ImageData`.

    Raises:
        UserError: a number is out of range, or `labels_per_class` above the training images of a class.
    """

    num_classes = 10
    gray = True

    def __init__(
        self,
        labels_per_class: int | None = None,
        labeled_only: bool = False,
        image_size: int = 32,
        augment: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_at_least(1, **{"data.labels_per_class": labels_per_class, "data.image_size": image_size})
        if labels_per_class is not None and self.longtail is not None:
            raise UserError(
                f"data.labels_per_class {labels_per_class} and data.longtail both set the labels of each class: give "
                "one of them"
            )
        self.labels_per_class = labels_per_class
        self.labeled_only = labeled_only
        self.augment = augment
        self.image_shape = (3, image_size, image_size)

    def samples(self, split: Split) -> ImageDataset:
        """Return the images of a split as `[3, side, side]` in [0, 1]."""
        images, labels = _load(split)
        if split == "train" and self.labels_per_class is not None:
            counts = labels.bincount(minlength=self.num_classes)
            if self.labels_per_class > (fewest := int(counts.min())):
                raise UserError(
                    f"data.labels_per_class is {self.labels_per_class}, more than the {fewest} training images of "
                    f"class {int(counts.argmin())}: give {fewest} or less, or null for all labels"
                )
            labeled = _first_of_each_class(labels, self.labels_per_class)
            if self.labeled_only:
                images, labels = images[labeled], labels[labeled]
            else:
                labels = torch.where(labeled, labels, -1)
        images = functional.interpolate(images, self.image_shape[1:], mode="bilinear", align_corners=False)
        source = ArraySource(images.expand(-1, 3, -1, -1), labels.tolist())
        return ImageDataset(source, _augmentation() if split == "train" and self.augment else _unchanged)


def _load(split: Split) -> tuple[Tensor, Tensor]:
    """Return images `[N, 1, 8, 8]` in [0, 1] and labels `[N]` of a split, in a fixed shuffled order."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rest = list(range(len(digits.target)))
    positions: dict[str, list[int]] = {}
    for name in ("test", "val"):
        size = round(_SHARES[name] * len(digits.target))
        rest, positions[name] = train_test_split(
            rest, test_size=size, stratify=digits.target[rest], random_state=_SPLIT_SEED
        )
    positions["train"] = rest
    chosen = positions[split]
    images = torch.from_numpy(digits.images[chosen]).float().div(16.0).unsqueeze(1)
    return images, torch.from_numpy(digits.target[chosen]).long()


def _first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Return a mask `[N]` of the first `count` samples of every class."""
    one_hot = functional.one_hot(labels)
    number_in_class = (one_hot.cumsum(0) * one_hot).sum(1)
    return number_in_class <= count


def _augmentation() -> torch.nn.Module:
    from torchvision.transforms import v2

    affine: torch.nn.Module = v2.RandomAffine(
        degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
    )
    return affine


def _unchanged(image: Tensor) -> Tensor:
    return image
