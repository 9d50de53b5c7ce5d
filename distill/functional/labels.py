"""Labels of images, some of which have none."""

from __future__ import annotations

from torch import Tensor


def hard_labels(label: Tensor) -> Tensor:
    """Return the largest class of soft labels, -1 for rows of zeros; hard labels stay as they are.

    Args:
        label: classes `[B]`, -1 for unlabeled, or soft labels `[B, K]`.

    Returns:
        int64 `[B]`.
    """
    if label.ndim == 1:
        return label
    return label.argmax(dim=1).masked_fill(label.sum(dim=1) <= 0, -1)
