"""Throughput of the loader alone, of photos beside torchvision's own recipe, and the time that a step waits for it.

    python experiments/benchmarks/data.py

The small images are noise in CIFAR-100's own files, 32 x 32, shifted and flipped as in training; the photos are crops
of scikit-image's as JPEG files of 500 x 375.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import skimage.data
import torch
import torchvision
from heads import Bench
from pairs import pairs
from PIL import Image
from timing import CONSOLE, Bound, Run, command_line, interleaved, median_ratio, milliseconds, now, spread, table
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from distill.data import ArraySource, ImageDataset, ImageFolder, small_image_transform
from distill.data.augmentation import in_unit_range
from distill.data.cifar import CIFAR100
from distill.heads.kd import KD

IMAGES, BATCH = 4096, 64
WORKERS = sorted({0, 1, max(os.cpu_count() or 1, 1)})
WAITED = max(os.cpu_count() or 1, 1)
"""Number of workers for which the bound says that the step never waits: one for each core."""
PHOTOS, SIDES = 64, [224, 128]


def measure(run: Run) -> list[Bound]:
    """Print the tables; return the bounds on photos, small images and waiting."""
    images = 512 if run.tiny else IMAGES
    bounds = _small_images(run)
    with tempfile.TemporaryDirectory() as folder:
        _write_photos(Path(folder), 8 if run.tiny else PHOTOS)
        for side in SIDES[:1] if run.tiny else SIDES:
            bounds += _photos(run, folder, side)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), images)
        _alone(run, folder)
        return bounds + _beside_the_step(run, folder)


def _small_images(run: Run) -> list[Bound]:
    """Print a table of one process's samples of 32 x 32, keyed, beside torchvision's transforms without keys."""
    arrays = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    samples = ImageDataset(ArraySource(arrays, [0] * BATCH), small_image_transform(32, augment=True)).as_bytes()
    keys = [(0, index) for index in range(BATCH)]
    plain = v2.Compose([v2.ToImage(), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToPureTensor()])
    contenders: dict[str, Callable[[], object]] = {
        "this project, keyed": lambda: default_collate(samples.__getitems__(keys)),
        "torchvision's transforms, without keys": lambda: default_collate([(plain(array), 0) for array in arrays]),
    }
    return _samples_table(run, contenders, BATCH, "Samples of 32 x 32 in one process, shifted and flipped", 1.0)


def _write_photos(folder: Path, count: int) -> None:
    """Write photos as JPEG files in class folders."""
    sources = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "rocket", "chelsea")]
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split / "class").mkdir(parents=True)
    for number in range(count):
        source = sources[number % len(sources)]
        height = int(random.integers(200, source.height))
        width = min(height * 4 // 3, source.width)
        left, top = (int(random.integers(0, room + 1)) for room in (source.width - width, source.height - height))
        photo = source.crop((left, top, left + width, top + height)).resize((500, 375))
        photo.save(folder / "train" / "class" / f"{number}.jpg", quality=90)
    photo.save(folder / "val" / "class" / "0.jpg")


def _photos(run: Run, folder: str, side: int) -> list[Bound]:
    """Print a table of photos decoded, cropped and flipped in one process: what a worker does, all cores alike."""
    crops = [v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*crops, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    reference = torchvision.datasets.ImageFolder(f"{folder}/train", transform)
    count = len(reference)
    contenders: dict[str, Callable[[], object]] = {
        "torchvision's recipe": partial(_first, DataLoader(reference, batch_size=count))
    }
    for decoder in ("pil", "torchvision"):
        data = ImageFolder(folder, image_size=side, decoder=decoder, batch_size=count, num_workers=0)
        samples = data.samples("train").as_bytes()
        keys = [(0, index) for index in range(count)]
        contenders[f"this project, decoder {decoder}"] = partial(_on_device, samples, keys)
    return _samples_table(run, contenders, count, f"Photos of 500 x 375 to {side} x {side} in one process", 1.05)


def _first(loader: DataLoader[Any]) -> object:
    return next(iter(loader))


def _on_device(samples: ImageDataset, keys: list[tuple[int, int]]) -> object:
    """Return floats like the other contenders, whose conversion is otherwise the device's."""
    return in_unit_range(default_collate(samples.__getitems__(keys))["image"])


def _samples_table(
    run: Run, contenders: dict[str, Callable[[], object]], count: int, title: str, at_most: float
) -> list[Bound]:
    """Print images per second on one thread; return the bounds on this project's time relative to torchvision's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    seconds = interleaved(contenders, run.repeat(9), run, title)
    torch.set_num_threads(threads)
    (baseline,) = (name for name in contenders if name.startswith("torchvision"))
    rows, bounds = [], []
    for name, times in seconds.items():
        ratio = median_ratio(times, seconds[baseline])
        best, middle = (1e3 * figure / count for figure in (min(times), median(times)))
        rows.append([name, f"{1e3 / best:,.0f}", f"{best:.3f}", f"{middle:.3f}", f"{ratio:.2f}"])
        if name != baseline:
            what = f"6 data, {title.split(' in ')[0]}, {name}: time / torchvision's"
            bounds.append(Bound(what, min(times) / min(seconds[baseline]), at_most=at_most))
    head = ["", "images per second and worker", "ms per image (best)", "ms (median)", "time / torchvision's"]
    CONSOLE.print(table(title, head, rows))
    return bounds


def _write(folder: Path, images: int) -> None:
    """Write noise in the format of CIFAR-100's authors."""
    random = np.random.default_rng(0)
    (folder / "cifar-100-python").mkdir()
    contents = {"train": images, "test": 100, "meta": 0}
    for name, count in contents.items():
        entry: dict[str, Any] = {"fine_label_names": [f"{number}" for number in range(100)]}
        if count:
            entry = {
                "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
                "fine_labels": [number % 100 for number in range(count)],
            }
        (folder / "cifar-100-python" / name).write_bytes(pickle.dumps(entry))


def _batches(folder: str, workers: int, size: int) -> Iterator[dict[str, Any]]:
    """Iterate endlessly over batches of the project's own loader."""
    data = CIFAR100(folder, verify=False, batch_size=size, num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    while True:
        yield from loader


def _alone(run: Run, folder: str) -> None:
    """Print a table of the loader that nothing waits for."""
    rounds = run.repeat(40)
    rows = []
    for workers in WORKERS:
        batches = _batches(folder, workers, BATCH)
        for _ in range(max(2 * workers, 1) + 1):  # batches prepared ahead would look like speed
            next(batches)
        times = []
        for _ in range(rounds):
            started = perf_counter()
            next(batches)
            times.append(perf_counter() - started)
        _, *quarters = spread(times)
        rate = BATCH * rounds / sum(times)
        rows.append([f"{workers}", f"{rate:,.0f}", " / ".join(map(milliseconds, quarters))])
    head = ["workers", "images per second", f"ms per batch of {BATCH} (quartiles)"]
    CONSOLE.print(table("The loader alone: 32 x 32, shifted and flipped", head, rows))


def _beside_the_step(run: Run, folder: str) -> list[Bound]:
    """Print a table of the loader under the second pair's step with KD."""
    pair = pairs(run)[1]
    bench = Bench(pair, run)
    step = bench.step([KD()])
    rows, bounds = [], []
    for workers in WORKERS:
        batches = _batches(folder, workers, bench.images)
        waits, whole = [], []
        for number in range(run.repeat(15) + 1):
            started = perf_counter()
            batch = next(batches)
            waited = perf_counter() - started
            bench.batch = {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}
            bench.batch["label"] = bench.batch["label"] % pair.classes
            step()
            if number:  # the first step waits for the workers to start
                waits.append(waited)
                whole.append(now(run.device) - started)
        share = sum(waits) / sum(whole)
        _, *quarters = spread(waits)
        steps = " / ".join(map(milliseconds, spread(whole)[1:]))
        rows.append([f"{workers}", " / ".join(map(milliseconds, quarters)), steps, f"{100 * share:.2f} %"])
        if workers == WAITED:
            bounds.append(Bound(f"6 data, {workers} workers: share of the step that waits", share, at_most=0.01))
    head = ["workers", "ms waited (quartiles)", "ms per step (quartiles)", "share waited"]
    CONSOLE.print(table(f"The loader under the step: {pair.title}, {bench.images} images, CE + KD", head, rows))
    return bounds


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
