"""Gain of two processes on the CPU, and the time that each head spends in collectives.

    python experiments/benchmarks/scaling.py

One thread per process, gloo. The time of a collective includes the wait for the other process; both start together.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
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
    steps: dict[int, list[float]] = {count: _in_processes(_steps, count, run)[0] for count in (1, PROCESSES)}
    rows = []
    for count, times in steps.items():
        best, *quarters = spread(times)
        gain = count * median(steps[1]) / median(times)
        rows.append([f"{count}", milliseconds(best), " / ".join(map(milliseconds, quarters)), f"{gain:.2f}"])
    head = ["processes", "ms per step (best)", "quartiles", "images per second / those of one"]
    CONSOLE.print(table(f"Processes: {pair.title}, {pair.images} images and one thread each, CE + KD", head, rows))

    heads: Times = _in_processes(_heads, PROCESSES, run)[0]
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


def _in_processes(work: Callable[[Run], Any], count: int, run: Run) -> list[Any]:
    """Run `work` in each process of a group, and return all results."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
        jobs = [(work, run, rank, count, str(Path(folder) / "group")) for rank in range(count)]
        results: list[Any] = pool.starmap_async(_rank, jobs, chunksize=1).get(PATIENCE)
    return results


def _rank(work: Callable[[Run], Any], run: Run, rank: int, count: int, file: str) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=count)
    try:
        return work(run)
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
    batch["index"] = batch["index"] + dist.get_rank() * len(batch["index"])
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
            with _gathering() as spent:
                started = perf_counter()
                head(leaves, teacher_features, batch).backward()
                elapsed = perf_counter() - started
            if number >= run.warm_up:
                times.append(elapsed)
                gathered.append(sum(spent))
        seconds[name] = times, gathered
    return seconds


@contextlib.contextmanager
def _gathering() -> Iterator[list[float]]:
    """Collect the seconds of each collective that `distill.distributed` calls."""
    spent: list[float] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            result = collective(*args, **kwargs)
            spent.append(perf_counter() - started)
            return result

        return call

    for name, collective in originals.items():
        setattr(dist, name, timed(collective))
    try:
        yield spent
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
