"""How images become tensors: small ones, photos, and the augmentation of timm's recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from distill.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]


@dataclass
class TimmAugmentation:
    """What timm's training script does to a training image, besides crop and flip.

    Args:
        auto_augment: a policy in timm's words, such as `rand-m9-mstd0.5-inc1` (RandAugment as DeiT uses it).
        color_jitter: strength of a color jitter; timm leaves it out where there is a policy.
        erasing: probability of random erasing.
        erasing_mode: what is put in: `pixel` noise, one random color (`rand`), or the mean (`const`).

    Raises:
        UserError: a probability outside of 0 to 1, or no policy of timm.
    """

    auto_augment: str | None = None
    color_jitter: float = 0.0
    erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"

    def __post_init__(self) -> None:
        if not 0 <= self.erasing <= 1:
            raise UserError(f"data.augment.erasing must be from 0 to 1, given {self.erasing}")

    def transform(self, side: int, interpolation: Interpolation) -> Any:
        """From an image of PIL to a float tensor `[3, side, side]`, in [0, 1] but for what erasing has put in.

        Raises:
            UserError: timm does not know the policy.
        """
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.data.transforms_factory import create_transform
        from torchvision.transforms import v2

        try:
            timms = create_transform(
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
        # timm erases in normalized colors; the networks normalize by themselves.
        mean = [-mean / std for mean, std in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)]
        return v2.Compose([timms, v2.Normalize(mean, [1 / std for std in IMAGENET_DEFAULT_STD])])


def small_images(side: int, augment: bool) -> Any:
    """For sets of small images, from what torchvision's `ToImage` takes to a float tensor `[3, side, side]` in [0, 1].

    Args:
        side: the images are resized to this size (bilinear, antialiased) if they have another.
        augment: shift them by up to an eighth of the side (4 of 32 pixels, as on CIFAR) and flip them.
    """
    import torch
    from torchvision.transforms import v2

    moved = [v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()] if augment else []
    resized = v2.Resize((side, side), antialias=True)
    return v2.Compose([v2.ToImage(), resized, *moved, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def photos(side: int, augment: bool | TimmAugmentation, interpolation: Interpolation) -> Any:
    """For photos of any size, from an image of PIL to a float tensor `[3, side, side]` in [0, 1].

    Args:
        side: of the square crop.
        augment: random resized crops and flips, or these and what a `TimmAugmentation` adds; `False` takes the center
            of the image, resized to 8/7 of the side.
        interpolation: how images are resized.
    """
    import torch
    from torchvision.transforms import v2

    if isinstance(augment, TimmAugmentation):
        return augment.transform(side, interpolation)
    how = v2.InterpolationMode(interpolation)
    if augment:
        crop = [v2.RandomResizedCrop(side, interpolation=how, antialias=True), v2.RandomHorizontalFlip()]
    else:
        crop = [v2.Resize(round(side / 0.875), interpolation=how, antialias=True), v2.CenterCrop(side)]
    return v2.Compose([v2.ToImage(), *crop, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
