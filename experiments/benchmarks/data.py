"""Throughput of the loader alone, and the time that a step waits for it.

    python experiments/benchmarks/data.py

The images are noise in CIFAR-100's own files, 32 x 32, shifted and flipped as in training.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from heads import Bench
from pairs import pairs
from timing import CONSOLE, Bound, Run, command_line, milliseconds, now, spread, table

from distill.data.cifar import CIFAR100
from distill.heads.kd import KD

IMAGES, BATCH = 4096, 64
WORKERS = [0, 1, 2]
WAITED = 2
"""Number of workers for which the bound says that the step never waits."""


def measure(run: Run) -> list[Bound]:
    """Print two tables; return the bound on waiting."""
    images = 512 if run.tiny else IMAGES
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), images)
        _alone(run, folder)
        return _beside_the_step(run, folder)


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
