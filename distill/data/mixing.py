"""Mixup and CutMix of images, labels and segments."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf
from typing import Any

import torch
from torch.nn import functional

from distill.errors import UserError, require_at_least
from distill.randomness import derive_seed, seeded_by


@dataclass
class Mixing:
    """Pairwise mixing of the images of a batch, on the device; labels become soft.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 disables mixup.
        cutmix: alpha of CutMix's Beta distribution; 0 disables CutMix. With both, each batch draws one of them.

    Raises:
        UserError: an alpha is negative or not finite.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        alphas = {"data.mixing.mixup": self.mixup, "data.mixing.cutmix": self.cutmix}
        require_at_least(0, **alphas)
        if infinite := [name for name, alpha in alphas.items() if isinf(alpha)]:
            raise UserError(f"{infinite[0]} must be finite, given inf")


def mixing_seed(batch: dict[str, Any], seed: int) -> int:
    """Return the seed of a batch's mixing, which depends only on the run's seed and the images and draws in the batch.

    Args:
        batch: `index` and `draw` `[B]`, on the host.
        seed: of the run.
    """
    return derive_seed("mixing", seed, batch["index"].tolist(), batch["draw"].tolist())


def mix(batch: dict[str, Any], num_classes: int, mixing: Mixing, seed: int) -> dict[str, Any]:
    """Mix a batch with itself by mixup or CutMix.

    If the workers have computed `segments`, CutMix pastes them with the pixels: segment k of the image becomes 2 k,
    and segment k of the pasted box 2 k + 1. Segments do not apply to images blended by mixup, which removes them.

    Args:
        batch: `image` `[B, C, H, W]`, `label` `[B]`, -1 for unlabeled: such a sample adds nothing to the soft label.
        num_classes: K.
        mixing: the settings.
        seed: of the draws, see `mixing_seed`.

    Returns:
        The batch with mixed `image` and soft `label` `[B, K]`, whose rows sum to the labeled share of the mixed image.
    """
    with seeded_by("mixing", seed):
        return _mixed(batch, num_classes, mixing)


def _mixed(batch: dict[str, Any], num_classes: int, mixing: Mixing) -> dict[str, Any]:
    from torchvision.transforms import v2

    image, label = batch["image"], batch["label"]
    soft = functional.one_hot(label.clamp_min(0), num_classes).to(image.dtype) * (label >= 0).unsqueeze(1)
    kinds = [(kind, alpha) for kind, alpha in ((v2.MixUp, mixing.mixup), (v2.CutMix, mixing.cutmix)) if alpha > 0]
    if not kinds:
        return {**batch, "label": soft}
    kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
    mixer = kind(alpha=alpha, num_classes=num_classes)
    if "segments" not in batch:
        image, soft = mixer(image, soft)
        return {**batch, "image": image, "label": soft}
    rest = {name: value for name, value in batch.items() if name != "segments"}
    if kind is v2.MixUp:
        image, soft = mixer(image, soft)
        return {**rest, "image": image, "label": soft}
    # Mix the segments and the image that each pixel comes from as two additional channels.
    source = torch.arange(len(image), device=image.device).view(-1, 1, 1).expand_as(batch["segments"])
    layers = torch.stack([batch["segments"], source], dim=1).to(image.dtype)
    channels, soft = mixer(torch.cat([image, layers], dim=1), soft)
    image, segments, mixed_source = channels[:, :-2], channels[:, -2].long(), channels[:, -1].long()
    return {**rest, "image": image.contiguous(), "label": soft, "segments": 2 * segments + (mixed_source != source)}
