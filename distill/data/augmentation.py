"""Transforms of images to tensors: for small images, for photos, and timm's augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from distill.errors import UserError, require_between

Interpolation = Literal["bilinear", "bicubic"]


@dataclass
class TimmAugmentation:
    """The augmentation of timm's training script, in addition to random crops and flips.

    Args:
        auto_augment: a policy in timm's notation, such as `rand-m9-mstd0.5-inc1` (RandAugment as DeiT uses it).
        color_jitter: strength of the color jitter; timm ignores it if a policy is given.
        erasing: probability of random erasing.
        erasing_mode: the replacement: `pixel` noise, a random color (`rand`), or the mean (`const`).

    Raises:
        UserError: the probability is not between 0 and 1, or timm does not know the policy.
    """

    auto_augment: str | None = None
    color_jitter: float = 0.0
    erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"

    def __post_init__(self) -> None:
        require_between(0, 1, **{"data.augment.erasing": self.erasing})

    def transform(self, side: int, interpolation: Interpolation) -> Any:
        """Create the transform of a PIL image to a float tensor `[3, side, side]`, in [0, 1] except for erased pixels.

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
            raise UserError(f"data.augment.auto_augment: timm knows no policy {self.auto_augment!r}: {error}") from None
        # timm erases in normalized colors, but here the networks normalize: undo timm's normalization.
        mean = [-mean / std for mean, std in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)]
        return v2.Compose([transform, v2.Normalize(mean, [1 / std for std in IMAGENET_DEFAULT_STD])])


def small_image_transform(side: int, augment: bool) -> Any:
    """Create the transform of a small image to a float tensor `[3, side, side]` in [0, 1].

    It takes whatever torchvision's `ToImage` takes: PIL images, arrays `[H, W, 3]`, tensors `[3, H, W]`.

    Args:
        side: size in pixels; other sizes are resized to it (bilinear, antialiased).
        augment: shift by up to an eighth of the side (4 of 32 pixels, as usual for CIFAR) and flip at random.
    """
    import torch
    from torchvision.transforms import v2

    augmentation = [v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()] if augment else []
    resize = v2.Resize((side, side), antialias=True)
    return v2.Compose([v2.ToImage(), resize, *augmentation, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def photo_transform(side: int, augment: bool | TimmAugmentation, interpolation: Interpolation) -> Any:
    """Create the transform of a PIL image of any size to a float tensor `[3, side, side]` in [0, 1].

    Args:
        side: of the square crop, in pixels.
        augment: random resized crops and flips, or these and the augmentation of a `TimmAugmentation`; `False` takes
            the center crop of the image resized to 8/7 of the side.
        interpolation: for resizing.
    """
    import torch
    from torchvision.transforms import v2

    if isinstance(augment, TimmAugmentation):
        return augment.transform(side, interpolation)
    mode = v2.InterpolationMode(interpolation)
    if augment:
        crop = [v2.RandomResizedCrop(side, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
    else:
        crop = [v2.Resize(round(side / 0.875), interpolation=mode, antialias=True), v2.CenterCrop(side)]
    return v2.Compose([v2.ToImage(), *crop, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
