"""Backend with the fast-slic library, one CPU thread per image."""

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

NOT_FINITE = "images must be finite, but some contain NaN or infinity"
MAX_SEGMENTS = 65533
"""The library's maximum."""


def is_installed() -> bool:
    """Return whether fast-slic can be imported."""
    return find_spec("fast_slic") is not None


def fast_slic(images: Tensor, segments: int, compactness: float, iterations: int) -> Tensor:
    """Return labels for each image, connected and without gaps, numbered in order of appearance.

    Args:
        images: `[B, 3, H, W]` in [0, 1], on the CPU.
        segments: maximum number, at most H W (more would crash the process).
        compactness: on the library's own scale.
        iterations: of k-means.

    Returns:
        `[B, H, W]` int64.

    Raises:
        UserError: some values are not finite.
    """
    pixels = images.float().numpy()
    labels = np.empty((len(pixels), *pixels.shape[2:]), dtype=np.int64)
    label = partial(_label, _kind(), segments, compactness, iterations)
    # The library releases the GIL. Its own threads would hang in a forked data worker, and torch's threads keep cores
    # busy for a while after each operation, so nothing here uses torch.
    workers = min(torch.get_num_threads(), len(pixels))
    if workers == 1:
        label(pixels, labels)
    else:
        chunks = min(len(pixels), 4 * workers)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(label, np.array_split(pixels, chunks), np.array_split(labels, chunks)))
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
    for image, label in zip(images, labels, strict=True):
        if not np.isfinite(image.sum()):
            raise UserError(NOT_FINITE)
        pixels = np.ascontiguousarray((image.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
        # A new object per image, since it would start from the clusters of the previous one.
        slic = kind(num_components=segments, compactness=compactness, num_threads=1)
        label[:] = slic.iterate(pixels, max_iter=iterations).view(np.uint16)  # labels above 32767 wrap around


def _kind() -> Any:
    try:
        from fast_slic.avx2 import SlicAvx2
    except ImportError:  # built without AVX2
        from fast_slic import Slic

        return Slic
    return SlicAvx2
