"""Cost of superpixels: images per second of each engine, and their share of a training step.

    python experiments/benchmarks/superpixels.py
    python experiments/benchmarks/superpixels.py --device cuda

Contenders run interleaved, in a random order in each round; the tables show the best round and the quartiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import skimage.data
import skimage.segmentation
import torch
from heads import Bench
from pairs import pairs
from timing import CONSOLE, Bound, Run, command_line, comparison, interleaved, spread, table
from torch import Tensor
from torchvision.transforms import v2

from distill.heads import KD, SeRKD
from distill.superpixels import slic
from distill.superpixels.fast_slic import is_installed
from distill.superpixels.pixels import Backend

SIZES = [(64, 32, 16), (64, 32, 64), (16, 224, 196)]
"""Number of images, side in pixels, number of segments."""
ON_GPU = [*SIZES, (128, 224, 196)]
TINY = [(2, 32, 16)]
SPEED = 3 * 67 / 41
"""Bound on the speed of torch SLIC relative to scikit-image's at 224 x 224, on one thread: three times that of the
version 0.2 recorded in the README, 67 images per second beside 41."""


def measure(run: Run) -> list[Bound]:
    """Print a table for each size and one of the step; return the bound on torch SLIC."""
    bounds: list[Bound] = []
    for images, side, segments in TINY if run.tiny else ON_GPU if run.on_gpu else SIZES:
        bounds += _engines(photos(images, side).to(run.device), segments, run)
    _step(run)
    return bounds


def photos(count: int, side: int) -> Tensor:
    """Return random crops of scikit-image's photos, `[count, 3, side, side]` in [0, 1]."""
    sources = [v2.functional.to_image(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "rocket")]
    crop = v2.RandomResizedCrop(side, scale=(0.25, 1.0), ratio=(1.0, 1.0), antialias=True)
    torch.manual_seed(0)
    return torch.stack([crop(sources[number % len(sources)]) for number in range(count)]).float() / 255


def _engines(images: Tensor, segments: int, run: Run) -> list[Bound]:
    """Print a table of the engines; return the bound on torch SLIC, or on a GPU on Triton's."""
    threads = torch.get_num_threads()
    contenders: dict[str, Callable[[], object]] = {}
    for number in [] if run.on_gpu else sorted({1, threads}):
        if is_installed():
            contenders[_threads("fast-slic", number)] = partial(_slic, images, segments, "fast_slic", number)
        contenders[_threads("torch SLIC", number)] = partial(_slic, images, segments, "torch", number)
    if run.on_gpu:
        contenders["torch SLIC"] = partial(slic, images, segments, backend="torch")
        contenders["Triton SLIC"] = partial(slic, images, segments, backend="triton")
    else:
        arrays = images.permute(0, 2, 3, 1).double().numpy()
        contenders[_threads("scikit-image", 1)] = partial(_scikit_image, arrays, segments)
    seconds = interleaved(contenders, run.repeat(9), run, f"{images.shape[-1]} pixels, {segments} segments")
    torch.set_num_threads(threads)
    rows = []
    for name, times in seconds.items():
        best, *quarters = (1e3 * figure / len(images) for figure in spread(times))
        rows.append([name, f"{1e3 / best:,.0f}", f"{best:.3f}", " / ".join(f"{figure:.3f}" for figure in quarters)])
    head = ["engine", "images per second", "ms per image (best)", "quartiles"]
    CONSOLE.print(
        table(f"{len(images)} images of {images.shape[-1]} x {images.shape[-1]}, {segments} segments", head, rows)
    )
    size = f"{images.shape[-1]} pixels, {segments} segments"
    if run.on_gpu:
        speed = min(seconds["torch SLIC"]) / min(seconds["Triton SLIC"])
        return [Bound(f"4 superpixels, {len(images)} images, {size}: Triton's speed / torch's", speed, at_least=1)]
    if images.shape[-1] < 224:
        return []
    here, reference = (min(seconds[_threads(name, 1)]) for name in ("torch SLIC", "scikit-image"))
    return [Bound(f"4 superpixels, {size}: torch SLIC's speed / scikit-image's", reference / here, at_least=SPEED)]


def _step(run: Run) -> None:
    """Print a table of the first pair's step: with KD alone, and with SeRKD."""
    pair = pairs(run)[0]
    bench = Bench(pair, run)
    images = photos(bench.images, pair.side).to(run.device)
    bench.batch["image"] = images
    tokens, _ = bench.student.spec["tokens"]
    count = min(49, tokens)

    def on_segments(backend: Backend) -> Callable[[], None]:
        train = bench.step([KD(), SeRKD(superpixels="segments", count=count)])

        def step() -> None:
            bench.batch["segments"] = slic(images, count, backend=backend)
            train()

        return step

    contenders: dict[str, Callable[[], None]] = {
        "CE + KD": bench.step([KD()]),
        "and SeRKD, soft": bench.step([KD(), SeRKD()]),
        "and SeRKD, torch SLIC": on_segments("torch"),
    }
    if run.on_gpu:
        contenders["and SeRKD, Triton SLIC"] = on_segments("triton")
    elif is_installed():
        contenders["and SeRKD, fast-slic"] = on_segments("fast_slic")
    seconds = interleaved(contenders, run.repeat(9), run, "training steps")
    comparison(f"The share of a step: {pair.title}, {len(images)} images, float32", seconds, "CE + KD")


def _slic(images: Tensor, segments: int, backend: Backend, threads: int) -> None:
    torch.set_num_threads(threads)
    slic(images, segments, backend=backend)


def _scikit_image(images: np.ndarray, segments: int) -> None:
    for image in images:
        skimage.segmentation.slic(image, segments, compactness=10, max_num_iter=10, enforce_connectivity=False)


def _threads(name: str, number: int) -> str:
    return f"{name}, {number} thread{'s' if number > 1 else ''}"


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
