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
    """
    pixels = images.float().numpy()
    label = partial(_labels, _kind(), segments, compactness, iterations)
    # The library leaves Python while it computes. Threads of its own would hang in a forked data worker.
    workers = min(torch.get_num_threads(), len(pixels))
    if workers == 1:
        return label(pixels)
    with ThreadPoolExecutor(workers) as pool:
        return torch.cat(list(pool.map(label, np.array_split(pixels, workers))))


def _labels(kind: Any, segments: int, compactness: float, iterations: int, images: NDArray[np.float32]) -> Tensor:
    pixels = np.ascontiguousarray((images.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1))
    # A new object for each image: it would start from the clusters of the one before.
    found = [
        kind(num_components=segments, compactness=compactness, num_threads=1).iterate(image, max_iter=iterations)
        for image in pixels
    ]
    return torch.from_numpy(np.stack(found).view(np.uint16).astype(np.int64))  # above 32767 labels have wrapped around


def _kind() -> Any:
    try:
        from fast_slic.avx2 import SlicAvx2
    except ImportError:  # built without AVX2
        from fast_slic import Slic

        return Slic
    return SlicAvx2
