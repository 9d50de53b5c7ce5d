"""Training with a stored teacher: the step relative to the student's alone, the bytes by head, and rows per second.

    python experiments/benchmarks/store.py
    python experiments/benchmarks/store.py --device cuda

A step lasts from the request for a batch to the optimizer's end. The images are in memory, and the loader has no
workers: reading and collating the teacher's rows is part of the step here, though workers would do it beside it.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from contenders import Setting, make_steps
from heads import TOGETHER, main_heads
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from pairs import Pair, pairs
from timing import CONSOLE, Bound, Run, command_line, comparison, interleaved, table
from torch import Tensor

from distill.data import ImageData, ImageDataset, Split
from distill.distiller import Distiller
from distill.errors import UserError
from distill.features import Features
from distill.heads import Batch, CrossEntropy, RunInfo, shipped
from distill.networks import FrozenTeacher, Teacher
from distill.networks.timm import Timm
from distill.objective import Objective, Term
from distill.schedules import Progress
from distill.store import Quantity, Rows, StoredRows, StoredTeacher, write_shard
from distill.store.shards import shard_path
from distill.training.distillation import DistillationModule
from distill.training.store_plan import plan_store, write_states
from distill.training.stored import attach
from distill.training.storing import answers, write_missing

ALONE = "CE alone"
PEERS = ("timm.task", "torchdistill")
EACH, ALL = 1.05, 1.15
"""Largest step with one stored term, and with all, relative to CE alone; best of the rounds."""
BATCHES, DRAWS = 2, 2
GRAM = Quantity("gram", (1225,), torch.float32)
"""Rows of about 5 kB: the centered Gram matrix of 49 superpixels."""
ROWS_PER_SECOND = 20_000
COUNT = 128
"""Rows that are read at once."""


def measure(run: Run) -> list[Bound]:
    """Print three tables for each pair and one of reading; return the bounds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bounds: list[Bound] = []
    for number, pair in enumerate(pairs(run)):
        bounds += _steps(pair, run, rounds=run.repeat(5 if number == 0 else 15))
    return [*bounds, *_reading(run)]


class Memory(ImageData):
    """Images of a pair, the same each time, in memory."""

    def __init__(self, pair: Pair, count: int, batch_size: int) -> None:
        super().__init__(batch_size=batch_size, draws=DRAWS)
        self.num_classes, self.image_shape = pair.classes, (3, pair.side, pair.side)
        self.count = count

    def samples(self, split: Split) -> ImageDataset:
        """Return the images."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.count, *self.image_shape, generator=generator)
        return ImageDataset([(image, number % self.num_classes) for number, image in enumerate(images)], Tensor.clone)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """Iterate endlessly over training batches."""
        loader = self.train_dataloader()
        epoch = 0
        while True:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # the package's own
            for batch in loader:
                yield move_data_to_device(batch, device)
            epoch += 1


@dataclass
class Bench:
    """The networks of a pair, their images, and the store of the teacher's answers."""

    pair: Pair
    run: Run
    folder: Path

    def __post_init__(self) -> None:
        pair = self.pair
        self.images = pair.images_on_gpu if self.run.on_gpu else pair.images
        student, _ = pair.networks()
        self.names = list(main_heads(student.spec, self.images))
        self.module = DistillationModule(
            student=Timm(pair.student, options=pair.options),
            teacher=Timm(pair.teacher, options=pair.options),
            heads={
                str(number): Term(head) for number, head in enumerate(main_heads(student.spec, self.images)[TOGETHER])
            },
            optimizer=pair.make_optimizer,
            num_classes=pair.classes,
            image_shape=(3, pair.side, pair.side),
        )
        self._store()
        self.student = self.module.student.train().to(self.run.device)
        teacher = self.module.teachers["teacher"]
        assert isinstance(teacher, FrozenTeacher)
        self.teacher = teacher.to(self.run.device)
        self.optimizer = pair.make_optimizer(self.student.parameters())

    def data(self) -> Memory:
        """Return the images, set up."""
        data = Memory(self.pair, BATCHES * self.images, self.images)
        data.setup("fit")
        return data

    def _store(self) -> None:
        trainer = Trainer(
            accelerator="gpu" if self.run.on_gpu else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = self.data()
        plan = plan_store(trainer, self.module, data, "teacher", ("train",), self.folder)
        plan.index.write(self.folder)
        write_states(self.module, "teacher", plan.requests, self.folder)
        for lacking in plan.lacking:
            write_missing(trainer, self.module, data, "teacher", plan.requests, lacking, plan.index, self.folder)

    def step(self, name: str | None, stored: bool = False) -> Callable[[], None]:
        """Return the step with CE and the heads of a name, beside a teacher that is stored or runs."""
        heads = main_heads(self.student.spec, self.images)[name] if name else []
        terms = {"task": Term(CrossEntropy()), **{str(number): Term(head) for number, head in enumerate(heads)}}
        objective = Objective(terms, self.student.spec, self.teacher.spec if heads else None)
        teacher: Teacher = self.teacher
        if stored:
            teacher = replayed = StoredTeacher(str(self.folder))
            replayed.build()
        distiller = Distiller(self.student, teacher if heads else None, objective).to(self.run.device)
        data = self.data()
        attach(distiller, data, ("train",))
        objective.prepare(RunInfo(batch_size=self.images, samples=data.count))
        optimizers = [self.optimizer]
        if learned := [parameter for parameter in objective.parameters() if parameter.requires_grad]:
            optimizers.append(self.pair.make_optimizer(learned))
        batches = data.batches(self.run.device)

        def step() -> None:
            loss = distiller(next(batches), Progress()).total
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

        return step


def _steps(pair: Pair, run: Run, rounds: int) -> list[Bound]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pair, run, Path(folder))
        stored = {f"{name}, stored": bench.step(name, stored=True) for name in bench.names}
        live = {f"{name}, live": bench.step(name) for name in bench.names}
        peers, failed = make_steps(Setting(pair, run), PEERS)
        peers = {f"KD, {name}": step for name, step in peers.items()}
        seconds = interleaved({ALONE: bench.step(None), **stored, **live, **peers}, rounds, run, pair.title)
        title = f"The step with a stored teacher: {pair.title}, {bench.images} images, float32"
        comparison(title, seconds, ALONE, failed=failed)
        _bytes(bench)
    return [
        Bound(
            f"11 store, {pair.title}: {name}, over CE alone",
            min(seconds[f"{name}, stored"]) / min(seconds[ALONE]),
            at_most=ALL if name == TOGETHER else EACH,
        )
        for name in bench.names
    ]


def _bytes(bench: Bench) -> None:
    """Print what each head with its defaults stores of an image and draw."""
    batch = next(bench.data().batches(bench.run.device))
    with torch.no_grad():
        student, teacher = bench.student(batch["image"]), bench.teacher(batch["image"])
    rows, failed = [], {}
    for name, kind in shipped().items():
        if not kind.needs_teacher:
            continue
        try:
            objective = Objective({"head": Term(kind())}, bench.student.spec, bench.teacher.spec).to(bench.run.device)
            found = _answers(objective, teacher, batch)
        except UserError as error:
            failed[name] = str(error)
            continue
        shapes = ", ".join(f"{part.split('.')[-1]} {_shape(tensor)}" for part, tensor in found.items())
        rows.append([name, shapes, f"{sum(tensor[0].nbytes for tensor in found.values()):,}"])
    del student
    CONSOLE.print(table(f"A stored row: {bench.pair.title}", ["head", "quantities", "bytes per image and draw"], rows))
    for name, reason in failed.items():
        CONSOLE.print(f"{name} does not fit: {reason}", markup=False)


def _answers(objective: Objective, teacher: Features, batch: Batch) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return answers(objective, objective.requests("teacher"), (), teacher, batch)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape[1:]))


def _reading(run: Run) -> list[Bound]:
    """Print the rows per second of a process on one thread; return the bound on rows in memory."""
    images = 1000 if run.tiny else 25_000
    rows = Rows(images, DRAWS, per_shard=8192)
    batches = 4 if run.tiny else 200
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rows.shards):
            write_shard(folder, "train", GRAM, number, torch.randn(len(rows.of(number)), *GRAM.shape), "key")
        stored = partial(StoredRows, folder, "train", [GRAM], rows, "key")
        rates: dict[str, list[float]] = {"in memory": [], "on the disk": []}
        for number in range(run.repeat(5)):
            if hasattr(os, "posix_fadvise"):
                _drop(folder, rows)
                rates["on the disk"].append(_rate(stored(), batches // 4, seed=2 * number))
            reader = stored()
            _rate(reader, batches, seed=2 * number + 1)
            rates["in memory"].append(_rate(reader, batches, seed=2 * number + 1))
            del reader
    torch.set_num_threads(threads)
    shown = [
        [name, f"{max(each):,.0f}", " / ".join(f"{rate:,.0f}" for rate in sorted(each))]
        for name, each in rates.items()
        if each
    ]
    title = f"Reading rows of {GRAM.bytes:,} bytes, {COUNT} at a time in random order, one thread"
    CONSOLE.print(table(title, ["rows", "per second (best)", "each round"], shown))
    return [Bound("11 store: rows of 5 kB per second, in memory", max(rates["in memory"]), at_least=ROWS_PER_SECOND)]


def _rate(stored: StoredRows, batches: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    keys = [
        [torch.randint(limit, (COUNT,), generator=generator) for limit in (stored.rows.draws, stored.rows.images)]
        for _ in range(batches)
    ]
    started = perf_counter()
    for draws, indices in keys:
        stored.batch(draws, indices)
    return batches * COUNT / (perf_counter() - started)


def _drop(folder: str, rows: Rows) -> None:
    """Let the system drop the files from memory, which it does only for pages that no process maps."""
    gc.collect()
    for number in range(rows.shards):
        descriptor = os.open(shard_path(folder, "train", GRAM, number), os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
