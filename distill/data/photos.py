"""Base of the data modules for photos of any size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from distill.data.augmentation import Interpolation, TimmAugmentation, photo_transform
from distill.data.base import ImageData
from distill.data.dataset import ImageDataset, Split
from distill.data.decoders import READERS, Decoder
from distill.data.sources import Source
from distill.errors import one_of, require_at_least


class PhotoData(ImageData, ABC):
    """Base of the data modules for photos: a subclass sets `num_classes` and implements `source`.

    Args:
        root: folder of the data.
        image_size: side of the square crop, in pixels.
        augment: random resized crops and flips of training images, or these and the augmentation of a
            `TimmAugmentation`; `false` takes the center crop.
        interpolation: for resizing.
        decoder: of image files: `torchvision` decodes JPEG files faster than `pil`, and gives equal pixels. It only
            matters to sources that have a `decoder`, such as `FileSource`.
        num_workers: worker processes that load batches.
        settings: further settings, see `ImageData`.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        augment: bool | TimmAugmentation = True,
        interpolation: Interpolation = "bilinear",
        num_workers: int = 4,
        decoder: Decoder = "pil",
        **settings: Any,
    ) -> None:
        super().__init__(num_workers=num_workers, **settings)
        require_at_least(1, **{"data.image_size": image_size})
        one_of("data.decoder", decoder, READERS)
        self.root = Path(root)
        self.augment = augment
        self.interpolation: Interpolation = interpolation
        self.decoder: Decoder = decoder
        self.image_shape = (3, image_size, image_size)

    @abstractmethod
    def source(self, split: Split) -> Source:
        """Return the images of a split as PIL images or tensors `[3, H, W]`, with their labels."""

    def samples(self, split: Split) -> ImageDataset:
        """Return the images of a split as `[3, side, side]` in [0, 1]."""
        augment = self.augment if split == "train" else False
        source = self.source(split)
        if hasattr(source, "decoder"):
            source.decoder = self.decoder
        return ImageDataset(source, photo_transform(self.image_shape[1], augment, self.interpolation))
