"""The fast-slic library as a backend: one CPU thread an image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import UserError

NOT_FINITE = "images must be finite, but some hold NaN or infinity"
MOST_SEGMENTS = 65533
"""The library takes no more."""


def is_installed() -> bool:
    """Whether fast-slic can be imported."""
    return find_spec("fast_slic") is not None


def fast_slic(images: Tensor, segments: int, compactness: float, iterations: int) -> Tensor:
    """Labels of each image, connected and without gaps, in the order in which they appear.

    Args:
        images: `[B, 3, H, W]` in [0, 1], on the CPU.
        segments: at most this many, and at most H W (more would kill the process).
        compactness: on the library's own scale.
        iterations: of its k-means.

    Returns:
        `[B, H, W]` int64.

    Raises:
        UserError: values that are not finite.
    """
    pixels = images.float().numpy()
    labels = np.empty((len(pixels), *pixels.shape[2:]), dtype=np.int64)
    label = partial(_label, _kind(), segments, compactness, iterations)
    # The library leaves Python while it computes. Threads of its own would hang in a forked data worker, and torch's
    # keep a core busy for a while after each operation, so nothing here is done by torch.
    workers = min(torch.get_num_threads(), len(pixels))
    if workers == 1:
        label(pixels, labels)
    else:
        parts = min(len(pixels), 4 * workers)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(label, np.array_split(pixels, parts), np.array_split(labels, parts)))
    return torch.from_numpy(labels)


def _label(
    kind: Any,
    segments: int,
    compactness: float,
    iterations: int,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> None:
    """Write the labels of images `[b, 3, H, W]` to `labels` `[b, H, W]`."""
    for image, place in zip(images, labels, strict=True):
        if not np.isfinite(image.sum()):
            raise UserError(NOT_FINITE)
        pixels = np.ascontiguousarray((image.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
        # A new object for each image: it would start from the clusters of the one before.
        library = kind(num_components=segments, compactness=compactness, num_threads=1)
        found = library.iterate(pixels, max_iter=iterations)
        place[:] = found.view(np.uint16)  # above 32767 labels have wrapped around


def _kind() -> Any:
    try:
        from fast_slic.avx2 import SlicAvx2
    except ImportError:  # built without AVX2
        from fast_slic import Slic

        return Slic
    return SlicAvx2
