"""Mixup and CutMix of images, labels and segments."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf
from typing import Any

import torch
from torch import Tensor

from distill.distributed import gather, own_rows, world_size
from distill.errors import UserError, require_at_least
from distill.randomness import seeded_by


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


def mix(batch: dict[str, Any], num_classes: int, mixing: Mixing, seed: int, views: int = 1) -> dict[str, Any]:
    """Mix each image of a batch with the one half a batch further by mixup or CutMix.

    The pairs are those of the batch of all ranks, dealt as a `ShuffledSampler` deals it. If a rank's batch is even,
    half of the whole is a multiple of the number of ranks, so that both images of a pair are on one rank; only for an
    odd batch are images sent between ranks. Several views of an image are all mixed with the same view of the same
    partner, in the same share or box.

    If the workers have computed `segments`, CutMix pastes them with the pixels: segment k of the image becomes 2 k,
    and segment k of the pasted box 2 k + 1. Segments do not apply to images blended by mixup, which removes them.

    Args:
        batch: `image` `[B, C, H, W]`, `label` `[B]`, -1 for unlabeled: such a sample adds nothing to the soft label.
            With V views both have V B rows, view after view.
        num_classes: K; 0 for images without labels, whose label stays -1.
        mixing: the settings.
        seed: of the draws, the same on all ranks: `mixing_seed` of a batch from `ImageData.train_dataloader`.
        views: V.

    Returns:
        The batch with mixed `image` and soft `label` `[B, K]`, whose rows sum to the labeled share of the mixed image.

    Raises:
        UserError: `views` is not the batch's, so that an image's views would get different partners.
    """
    from torchvision.transforms import v2

    image, label = batch["image"], batch["label"]
    if ("view" in batch) != (views > 1) or len(image) % views:
        has = "several views" if "view" in batch else "one view"
        raise UserError(
            f"mix: the batch has {len(image)} images in {has}, given {views} as the number of views, so that the views "
            "of an image would not be mixed alike: give theirs"
        )
    if num_classes == 0:
        return {**mix(batch, 1, mixing, seed, views), "label": label}
    soft = (label.unsqueeze(1) == torch.arange(num_classes, device=label.device)).to(image.dtype)
    kinds = [(kind, alpha) for kind, alpha in ((v2.MixUp, mixing.mixup), (v2.CutMix, mixing.cutmix)) if alpha > 0]
    if not kinds:
        return {**batch, "label": soft}
    with seeded_by("mixing", seed):
        kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
        drawn = kind(alpha=alpha).make_params([image])
    if kind is v2.MixUp:
        rest = {name: value for name, value in batch.items() if name != "segments"}
        return {
            **rest,
            "image": _blended(image, drawn["lam"], views),
            "label": _blended_labels(soft, drawn["lam"], views),
        }
    left, top, right, bottom = drawn["box"]
    box = (..., slice(top, bottom), slice(left, right))
    mixed = {"image": image.clone(), "label": _blended_labels(soft, drawn["lam_adjusted"], views)}
    mixed["image"][box] = _partners(image[box], views)
    if "segments" in batch:
        mixed["segments"] = 2 * batch["segments"]
        mixed["segments"][box] = _partners(mixed["segments"][box], views) + 1
    return {**batch, **mixed}


def _blended(tensor: Tensor, share: float, views: int) -> Tensor:
    return share * tensor + (1 - share) * _partners(tensor, views)


def _blended_labels(label: Tensor, share: float, views: int) -> Tensor:
    return _blended(label, share, views) if label.ndim == 2 else label


def _partners(tensor: Tensor, views: int) -> Tensor:
    """Return each row's partner, the row half of the batch of all ranks before it, around the end of its view."""
    ranks = world_size()
    half = ranks * len(tensor) // views // 2
    if half % ranks == 0:
        return tensor.reshape(views, len(tensor) // views, *tensor.shape[1:]).roll(half // ranks, 1).flatten(0, 1)
    gathered = gather(tensor)
    return own_rows(gathered.reshape(views, len(gathered) // views, *gathered.shape[1:]).roll(half, 1).flatten(0, 1))
