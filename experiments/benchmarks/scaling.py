"""Gain of two processes on the CPU, and the time that each head spends in collectives.

    python experiments/benchmarks/scaling.py

One thread per process, gloo. The time of a collective includes the wait for the other process; both start together.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pairs import pairs
from timing import CONSOLE, Bound, Run, command_line, milliseconds, spread, table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distill.errors import UserError
from distill.features import Features
from distill.heads import Head, shipped
from distill.networks import FrozenTeacher

PROCESSES = 2
PATIENCE = 600
"""Timeout of a group of processes, in seconds."""
Times = dict[str, tuple[list[float], list[float]]]
"""Seconds of each call of a head, and of the collectives in it, by the head's name."""


def measure(run: Run) -> list[Bound]:
    """Print two tables; there are no bounds."""
    run = replace(run, device=torch.device("cpu"), rounds=run.repeat(9))
    pair = pairs(run)[1]
    steps: dict[int, list[float]] = {count: in_processes(_steps, count, run)[0] for count in (1, PROCESSES)}
    rows = []
    for count, times in steps.items():
        best, *quarters = spread(times)
        gain = count * median(steps[1]) / median(times)
        rows.append([f"{count}", milliseconds(best), " / ".join(map(milliseconds, quarters)), f"{gain:.2f}"])
    head = ["processes", "ms per step (best)", "quartiles", "images per second / those of one"]
    CONSOLE.print(table(f"Processes: {pair.title}, {pair.images} images and one thread each, CE + KD", head, rows))

    heads: Times = in_processes(_heads, PROCESSES, run)[0]
    rows = []
    for name, (times, gathered) in sorted(heads.items()):
        share = 100 * median(gathered) / median(times)
        best, *quarters = spread(gathered)
        shown = milliseconds(best), " / ".join(map(milliseconds, quarters))
        rows.append([name, milliseconds(median(times)), *shown, f"{share:.0f} %"])
    head = ["", "ms of the head (median)", "ms gathering (best)", "quartiles", "share of the head"]
    CONSOLE.print(
        table(f"Gathering by head, {PROCESSES} processes: {pair.title}, {pair.images} images each", head, rows)
    )
    return []


def in_processes(work: Callable[..., Any], count: int, run: Run, *more: Any) -> list[Any]:
    """Run `work(run, *more)` in each process of a group, and return all results."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
        jobs = [(partial(work, run, *more), rank, count, str(Path(folder) / "group")) for rank in range(count)]
        results: list[Any] = pool.starmap_async(_rank, jobs, chunksize=1).get(PATIENCE)
    return results


def _rank(work: Callable[[], Any], rank: int, count: int, file: str) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=count)
    try:
        return work()
    finally:
        dist.barrier()
        dist.destroy_process_group()


def _steps(run: Run) -> list[float]:
    """Return the seconds of each step of the second pair under DDP."""
    pair = pairs(run)[1]
    batch = pair.batch(run)
    network, teacher = pair.networks()
    frozen = FrozenTeacher(teacher)
    student = DistributedDataParallel(network.model.train())
    optimizer = pair.make_optimizer(student.parameters())
    seconds = []
    for number in range(run.repeat(9) + run.warm_up):
        dist.barrier()
        started = perf_counter()
        image = network.prepare(batch["image"])
        logits, target = student(image), frozen(batch["image"])["logits"]
        kd = F.kl_div(
            F.log_softmax(logits / 4, 1), F.log_softmax(target / 4, 1), reduction="batchmean", log_target=True
        )
        loss = F.cross_entropy(logits, batch["label"]) + 16 * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number >= run.warm_up:
            seconds.append(perf_counter() - started)
    del student  # gloo hangs if a reducer outlives its group
    return seconds


def _heads(run: Run) -> Times:
    """Time each head's forward and backward pass, and the collectives in it."""
    pair = pairs(run)[1]
    batch = pair.batch(run)
    images = len(batch["index"])
    batch["index"] = batch["index"] + dist.get_rank() * images
    batch["view"] = torch.arange(images, device=run.device) * 2 // images  # for heads that compare two views
    student, teacher = pair.networks()
    student_features: Features = student(batch["image"]).apply(Tensor.detach)
    teacher_features: Features = FrozenTeacher(teacher)(batch["image"])
    seconds: Times = {}
    for name, kind in shipped().items():
        torch.manual_seed(0)
        head: Head = kind()
        try:
            head.check(student.spec, teacher.spec)
            head.build(student.spec, teacher.spec)
        except UserError:
            continue
        times, gathered = [], []
        for number in range(run.repeat(9) + run.warm_up):
            leaves = student_features.apply(lambda tensor: tensor.detach().requires_grad_())
            dist.barrier()
            with collectives() as calls:
                started = perf_counter()
                head(leaves, teacher_features, batch).backward()
                elapsed = perf_counter() - started
            if number >= run.warm_up:
                times.append(elapsed)
                gathered.append(sum(call.seconds for call in calls))
        seconds[name] = times, gathered
    return seconds


@dataclass(frozen=True)
class Collective:
    """A collective that was called.

    Attributes:
        kind: its name in `torch.distributed`.
        bytes: of what this rank put in.
        seconds: until it returned.
        is_check: whether it compares the ranks' numbers of samples, which happens on CPUs only.
    """

    kind: str
    bytes: int
    seconds: float
    is_check: bool


@contextlib.contextmanager
def collectives() -> Iterator[list[Collective]]:
    """Collect the collectives that `distill.distributed` calls."""
    calls: list[Collective] = []
    given = {"all_gather": 1, "all_reduce": 0, "reduce_scatter_tensor": 1}  # the place of what a rank puts in
    originals = {name: getattr(dist, name) for name in given}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[given[name]]
            started = perf_counter()
            result = originals[name](*args, **kwargs)
            is_check = name == "all_gather" and tensor.shape == (1,) and tensor.dtype == torch.int64
            calls.append(Collective(name, tensor.nbytes, perf_counter() - started, is_check))
            return result

        return call

    for name in originals:
        setattr(dist, name, recorded(name))
    try:
        yield calls
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
