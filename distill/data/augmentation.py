"""Transforms of images to tensors: for small images, for photos, and timm's augmentation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Literal

import torch
from torch import Tensor

from distill.configurable import Configurable
from distill.errors import UserError, require_at_least, require_between, require_finite, under

Interpolation = Literal["bilinear", "bicubic"]

_LONG = 16
"""Ratio of the sides above which an image is not resized as a whole."""


class Augmentation(Configurable, ABC):
    """Base of the augmentations that `data.train_views` names by their class."""

    @abstractmethod
    def view_transform(
        self, weak: Callable[[Any], Tensor], side: int, interpolation: Interpolation, gray: bool
    ) -> Callable[[Any], Tensor]:
        """Return the transform of a source's image to a view of it, a float tensor `[C, side, side]` in [0, 1].

        Args:
            weak: the data's own training transform, likewise.
            side: of the images, in pixels.
            interpolation: for resizing.
            gray: whether the images are gray, in one channel or in three equal ones.
        """


@dataclass
class TimmAugmentation(Augmentation):
    """The augmentation of timm's training script, in addition to random crops and flips.

    Args:
        auto_augment: a policy in timm's notation, such as `rand-m9-mstd0.5-inc1` (RandAugment as DeiT uses it).
        color_jitter: strength of the color jitter; timm ignores it if a policy is given.
        erasing: probability of random erasing.
        erasing_mode: the replacement: `pixel` noise, a random color (`rand`), or the mean (`const`).

    Raises:
        UserError: the probability is not between 0 and 1, the strength is negative or not finite, or timm does not know
            the policy.
    """

    auto_augment: str | None = None
    color_jitter: float = 0.0
    erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"

    def __post_init__(self) -> None:
        require_between(0, 1, erasing=self.erasing)
        require_at_least(0, color_jitter=self.color_jitter)
        require_finite(color_jitter=self.color_jitter)

    def view_transform(
        self, weak: Callable[[Any], Tensor], side: int, interpolation: Interpolation, gray: bool
    ) -> Callable[[Any], Tensor]:
        """Return `transform`, in place of the data's own."""
        transform: Callable[[Any], Tensor] = self.transform(side, interpolation)
        return transform

    def transform(self, side: int, interpolation: Interpolation) -> Any:
        """Create the transform of a photo to a float tensor `[3, side, side]`, in [0, 1] except for erased pixels.

        It takes what `photo_transform` takes.

        Raises:
            UserError: timm does not know the policy.
        """
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.data.transforms_factory import create_transform
        from torchvision.transforms import v2

        try:
            transform = create_transform(
                side,
                is_training=True,
                color_jitter=self.color_jitter,
                auto_augment=self.auto_augment,
                interpolation=interpolation,
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
                re_prob=self.erasing,
                re_mode=self.erasing_mode,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"auto_augment: timm knows no policy {self.auto_augment!r}: {error}") from None
        # timm erases in normalized colors, but here the networks normalize: undo timm's normalization.
        mean = [-mean / std for mean, std in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)]
        return v2.Compose([v2.ToPILImage(), transform, v2.Normalize(mean, [1 / std for std in IMAGENET_DEFAULT_STD])])


class BytesTransform:
    """A transform of a source's image to a float tensor `[C, H, W]` in [0, 1], in two steps.

    Args:
        pixels: from a source's image to a tensor `[C, H, W]`, of bytes where the source's pixels are bytes.
    """

    def __init__(self, pixels: Callable[[Any], Tensor]) -> None:
        self.pixels = pixels

    def __call__(self, image: Any) -> Tensor:
        return in_unit_range(self.pixels(image))


def in_unit_range(pixels: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]: integers divided by their largest number, floats as they are.

    The values are bit for bit the same on any device, and those of torchvision's `ToDtype(torch.float32, scale=True)`.
    """
    if pixels.is_floating_point():
        return pixels.to(torch.float32)
    return pixels.to(torch.float32).mul_(1.0 / (1 if pixels.dtype == torch.bool else torch.iinfo(pixels.dtype).max))


def small_image_transform(side: int, augment: bool) -> BytesTransform:
    """Create the transform of a small image to a float tensor `[3, side, side]` in [0, 1].

    It takes whatever torchvision's `ToImage` takes: PIL images, arrays `[H, W, 3]`, tensors `[3, H, W]`.

    Args:
        side: size in pixels; other sizes are resized to it (bilinear, antialiased).
        augment: shift by up to an eighth of the side (4 of 32 pixels, as usual for CIFAR) and flip at random.
    """
    return BytesTransform(_SmallImage(side, augment))


def photo_transform(side: int, augment: bool | TimmAugmentation, interpolation: Interpolation) -> Any:
    """Create the transform of a photo of any size to a float tensor `[3, side, side]` in [0, 1].

    It takes images of PIL and tensors `[3, H, W]` of bytes.

    Args:
        side: of the square crop, in pixels.
        augment: random resized crops and flips, or these and the augmentation of a `TimmAugmentation`; `False` takes
            the center crop of the image resized to 8/7 of the side.
        interpolation: for resizing.

    Raises:
        UserError: timm does not know the policy.
    """
    from torchvision.transforms import v2

    if isinstance(augment, TimmAugmentation):
        with under("data.augment"):
            return augment.transform(side, interpolation)
    mode = v2.InterpolationMode(interpolation)
    if augment:
        crop = [v2.RandomResizedCrop(side, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
    else:
        crop = [_CenterCrop(side, interpolation)]
    return BytesTransform(v2.Compose([v2.ToImage(), *crop, v2.ToPureTensor()]))


@dataclass(frozen=True)
class _SmallImage:
    """A small image as a tensor of a given side, shifted and flipped.

    Draws and pixels are those of torchvision's `RandomCrop(side, padding=side // 8)` and `RandomHorizontalFlip`, whose
    general machinery takes five times as long as the work on so small an image.
    """

    side: int
    augment: bool

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms.v2 import functional

        if not isinstance(image, Tensor):
            image = functional.to_image(image).as_subclass(Tensor)
        side, most = self.side, self.side // 8
        if image.shape[1:] != (side, side):
            image = functional.resize_image(image, [side, side], antialias=True)
        if not self.augment:
            return image  # type: ignore[no-any-return]  # torchvision has no types
        down, right = (most - int(torch.randint(0, 2 * most + 1, size=())) if most else 0 for _ in range(2))
        shifted = torch.zeros(image.shape, dtype=image.dtype)
        shifted[:, max(down, 0) : side + down, max(right, 0) : side + right] = image[
            :, max(-down, 0) : side - down, max(-right, 0) : side - right
        ]
        return shifted.flip(-1) if torch.rand(1) < 0.5 else shifted


class _CenterCrop:
    """Center crop of an image whose shorter side is resized to 8/7 of the crop's.

    Of very long images only the part in the crop is resized, since an image of 1 x 6000 pixels would grow to 1.2 GB:
    by Pillow, whose result differs from torchvision's by two of 255 levels at most.

    Args:
        side: of the crop, in pixels.
        interpolation: for resizing.
    """

    def __init__(self, side: int, interpolation: Interpolation) -> None:
        from torchvision.transforms import v2

        self.side = side
        self.interpolation = interpolation
        mode = v2.InterpolationMode(interpolation)
        self.shorter_side = round(side / 0.875)
        self.whole = v2.Compose([v2.Resize(self.shorter_side, interpolation=mode, antialias=True), v2.CenterCrop(side)])

    def __call__(self, image: Any) -> Any:
        """Resize and crop an image tensor `[C, H, W]`."""
        from PIL.Image import Resampling
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional

        height, width = functional.get_size(image)
        if max(height, width) <= _LONG * min(height, width):
            return self.whole(image)
        (top, bottom), (left, right) = (self._span(length, min(height, width)) for length in (height, width))
        reach = ceil(2 * max(1, min(height, width) / self.shorter_side)) + 1  # of the bicubic filter, in rows
        first = max(0, floor(top) - reach)
        picture = functional.to_pil_image(image[:, first : ceil(bottom) + reach])
        method = Resampling[self.interpolation.upper()]
        # Columns before rows as in torchvision; Pillow chooses the order by the size, with another result.
        picture = picture.resize((self.side, picture.height), method, box=(left, 0, right, picture.height))
        return v2.ToImage()(picture.resize((self.side,) * 2, method, box=(0, top - first, self.side, bottom - first)))

    def _span(self, length: int, shorter: int) -> tuple[float, float]:
        """Return where the crop begins and ends on a side of the image, in pixels of the image."""
        resized = int(self.shorter_side * length / shorter)
        offset = round((resized - self.side) / 2)
        return length * offset / resized, length * (offset + self.side) / resized
