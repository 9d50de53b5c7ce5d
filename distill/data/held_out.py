"""Validation images held out of the training images by a key of their own."""

from __future__ import annotations

from collections.abc import Sequence

from distill.errors import UserError
from distill.randomness import derive_seed


def require_fraction(fraction: float | None) -> None:
    """Require a fraction of images to lie between 0 and 1, both exclusive; `None` passes.

    Raises:
        UserError: it does not.
    """
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"data.val_fraction must be above 0 and below 1, given {fraction}")


def divide(keys: Sequence[str | int], fraction: float) -> tuple[list[int], list[int]]:
    """Divide images into those to train with and those held out for validation.

    An image is held out if a hash of its key is in the lowest `fraction` of all hashes. So it does not depend on the
    other images, a seed or a rank, a larger fraction holds out all images of a smaller one, and the share of the
    images held out is `fraction` only on average.

    Args:
        keys: one for each image, such as its file's name relative to the folder of the images.
        fraction: share of the images to hold out.

    Returns:
        The positions of the images to train with, and of those held out, both in rising order.

    Raises:
        UserError: one of them is empty.
    """
    training: list[int] = []
    held_out: list[int] = []
    for position, key in enumerate(keys):
        (held_out if derive_seed("validation", key) < fraction * 2**63 else training).append(position)
    if not held_out or not training:
        raise UserError(
            f"data.val_fraction {fraction} holds out {'none' if not held_out else 'all'} of the {len(keys)} images: "
            f"give {'more' if not held_out else 'less'}"
        )
    return training, held_out
