"""Superpixel segments of a batch."""

from __future__ import annotations

from typing import Any

from distill.superpixels.pixels import slic


def add_segments(batch: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return the batch with `segments`, int64 `[B, H, W]`, of its images.

    A batch that has them already, from the data's workers, is returned as it is.

    Args:
        batch: `image` `[B, C, H, W]` in [0, 1], as the networks will get it: augmented and mixed, not normalized.
        settings: arguments of `slic`.
    """
    return batch if "segments" in batch else {**batch, "segments": slic(batch["image"], **settings)}
