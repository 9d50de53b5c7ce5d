"""Superpixels of pixels: SLIC for a batch of images."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from distill.errors import UserError, one_of, require_above, require_at_least
from distill.superpixels import fast_slic
from distill.superpixels.clustering import Clustering, cell_grid
from distill.superpixels.color import rgb_to_lab
from distill.superpixels.connectivity import connect

Engine = Literal["torch", "fast_slic", "triton"]
Backend = Literal["auto", "torch", "fast_slic", "triton"]

_PART = 100_352
"""Pixels of a part of the images per thread of a CPU: two images of 224 x 224, whose distances have 3.6 MB."""


@torch.no_grad()
def slic(
    images: Tensor,
    segments: int = 196,
    compactness: float = 10.0,
    iterations: int = 10,
    connected: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return segments of each image: pixels of similar color that are close to each other.

    The backends differ in more than speed. `torch` returns exactly the labels of the grid `cell_grid(segments, H, W)`,
    in its order, and needs `connected` to make each of them connected, and so does `triton`, whose labels are the same
    up to the rounding of float32; `fast_slic` numbers its segments in order of appearance, may return fewer of them,
    and they are always connected, and its scale of compactness is another.

    Args:
        images: `[B, 3, H, W]`, or gray, `[B, 1, H, W]`, of any floating type, in [0, 1] and not normalized.
        segments: K, the maximum number; 196 corresponds to a ViT's 14 x 14 patches of 224 x 224 pixels.
        compactness: weight of position relative to color; 10 as in the literature.
        iterations: of k-means; 5 cost half and lose little.
        connected: assign all components of a segment but the largest to adjacent segments. On a GPU this synchronizes
            with the device.
        backend: `torch` on any device; `fast_slic` on the CPU, if it is installed; `triton` on a GPU, in float32, not
            measured on one yet; `auto` takes `fast_slic` for images in CPU memory if possible, and `torch` otherwise.

    Returns:
        `[B, H, W]` int64 in `0 .. K - 1`, the same for the same images each time.

    Raises:
        UserError: an argument is out of its range, or a backend is not available; for images on the CPU, where the
            check needs no synchronization, also if values are not finite.
    """
    _check(images, segments, compactness, iterations)
    with torch.autocast(images.device.type, enabled=False):
        engine = "torch" if torch.compiler.is_compiling() else backend_on(images.device, segments, backend)
        if engine == "fast_slic":
            labels = fast_slic.fast_slic(images.expand(-1, 3, -1, -1).cpu(), segments, compactness, iterations)
            return labels.to(images.device)
        # A sum is not finite if one of its values is not, and it is cheap.
        if _can_check_values(images) and not images.sum(dtype=torch.float32).isfinite():
            raise UserError(fast_slic.NOT_FINITE)
        segmented = _segments_by_triton if engine == "triton" else _segments
        return segmented(images, segments, compactness, iterations, connected)


def backend_on(device: torch.device, segments: int, backend: Backend) -> Engine:
    """Return which backend segments the images of a device.

    Args:
        device: of the images.
        segments: the maximum number.
        backend: the user's choice.

    Raises:
        UserError: the backend is unknown, not available, or does not support so many segments.
    """
    if one_of("backend", backend, ("auto", "torch", "fast_slic", "triton")) == "torch":
        return "torch"
    if backend == "auto":
        if device.type == "cpu" and segments <= fast_slic.MAX_SEGMENTS and fast_slic.is_installed():
            return "fast_slic"
        return "torch"
    if backend == "triton":
        if device.type != "cuda" or find_spec("triton") is None:
            raise UserError(
                f"backend 'triton' needs images on a GPU and the package triton, given images on {device.type}: use "
                "backend 'torch' or 'auto'"
            )
        return "triton"
    if not fast_slic.is_installed():
        raise UserError(
            "backend 'fast_slic' needs the fast-slic library, which is not installed: install distill[superpixels] "
            "with uv, or use backend 'torch'"
        )
    if segments > fast_slic.MAX_SEGMENTS:
        raise UserError(f"backend 'fast_slic' supports at most {fast_slic.MAX_SEGMENTS} segments, given {segments}")
    return "fast_slic"


def _segments(images: Tensor, segments: int, compactness: float, iterations: int, connected: bool) -> Tensor:
    size, parts = (images.shape[2], images.shape[3]), _parts(images)
    dtype = torch.promote_types(images.dtype, torch.float32)
    like = images.new_empty((), dtype=dtype)
    cluster = Clustering(size, cell_grid(segments, *size), compactness, iterations, len(parts[0]), like)
    labels = []
    for part in parts:
        colors = rgb_to_lab(part)
        found, centers = cluster(colors, last_centers=connected)
        labels.append(connect(found, colors, centers) if connected else found)
    return labels[0] if len(labels) == 1 else torch.cat(labels)


def _segments_by_triton(images: Tensor, segments: int, compactness: float, iterations: int, connected: bool) -> Tensor:
    from distill.superpixels.triton_slic import triton_clustering  # loads Triton

    grid = cell_grid(segments, *images.shape[2:])
    labels, colors, centers = triton_clustering(images, grid, compactness, iterations, last_centers=connected)
    return connect(labels, colors, centers) if connected else labels


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    """Divide images on a CPU into parts that fit its caches."""
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return (images,)
    return torch.split(images, max(_PART * torch.get_num_threads() // images[0, 0].numel(), 1))


def _check(images: Tensor, segments: int, compactness: float, iterations: int) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point() or not images.numel():
        raise UserError(
            f"images must be floating-point [B, 3, H, W] or [B, 1, H, W], given {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    height, width = images.shape[2:]
    if not 1 <= segments <= height * width:
        raise UserError(
            f"segments must be from 1 to {height * width} for images of {height} x {width} pixels, given {segments}"
        )
    require_above(0, compactness=compactness)
    require_at_least(1, iterations=iterations)


def _can_check_values(images: Tensor) -> bool:
    """Return whether values can be read without synchronizing with a device."""
    return images.device.type == "cpu" and not torch.compiler.is_compiling()
