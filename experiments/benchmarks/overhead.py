"""Cost of a step in Lightning's Trainer beyond forward, backward and optimizer, part by part in microseconds.

python experiments/benchmarks/overhead.py

Functions at the borders of the parts are wrapped by a clock that adds up the time within each, less that within others
that they call. What is left of the step is Lightning's loop. The Trainer has callbacks and logs as on the command line.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from statistics import median
from time import process_time
from typing import Any

from contenders import Setting, this_project
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from pairs import CIFAR, TINY, VIT, Pair
from timing import CONSOLE, Bound, Run, command_line, now, table

from distill.callbacks import ExactResume, RandomState, Results, RunCheckpoint
from distill.heads import Batch, Head
from distill.training.distillation import DistillationModule

base: Any = import_module("distill.training.base")  # modules whose functions are wrapped
classification: Any = import_module("distill.training.classification")
IMAGES = 8
SHOWN = 15
"""Number of rows, the longest parts of the step."""
COMPUTE, OURS, LIGHTNING = "compute", "this project", "Lightning"
LOOP = "the loop: fetching, hooks, progress, states"
KINDS = (COMPUTE, OURS, LIGHTNING)
AT_MOST = 0.05
"""Bound on this project's share of the step, for the small convolutional network."""


def measure(run: Run) -> list[Bound]:
    """Print a table for each student; return the bounds."""
    pairs = TINY[::-1] if run.tiny else (CIFAR, VIT)
    bounds = []
    for pair in pairs:
        alike = Pair(
            f"{pair.student} at {pair.side}",
            *(pair.student, pair.student, pair.side, pair.classes, IMAGES, IMAGES, pair.optimizer, pair.options),
        )
        shares = _student(alike, run)
        if pair in (CIFAR, TINY[1]):
            bounds.append(Bound(f"overhead: this project's share, {alike.title}", shares[OURS], at_most=AT_MOST))
    return bounds


@dataclass
class Clock:
    """Adds up the time of each part of the step.

    Attributes:
        now: the clock, in seconds.
        steps: seconds of each part, for each step.
    """

    now: Callable[[], float]
    steps: list[dict[tuple[str, str], float]] = field(default_factory=list)
    open: list[tuple[str, str]] = field(default_factory=list)
    since: float = 0.0

    def begin_step(self) -> None:
        """End the step, and begin the next."""
        self._count()
        self.steps.append({})

    def wrap(self, owner: Any, name: str, kind: str, part: str) -> None:
        """Count the time in the function `name` of an object or a module as that of a part."""
        function = getattr(owner, name)
        key = kind, part

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._count()
            self.open.append(key)
            try:
                return function(*args, **kwargs)
            finally:
                self._count()
                self.open.pop()

        setattr(owner, name, timed)

    def _count(self) -> None:
        moment = self.now()
        if self.steps:
            key = self.open[-1] if self.open else (LIGHTNING, LOOP)
            self.steps[-1][key] = self.steps[-1].get(key, 0.0) + moment - self.since
        self.since = self.now()


class Steps:
    """Loader that yields one batch again and again, and tells the clock.

    Args:
        batch: the batch.
        count: number of steps.
        clock: the clock.
    """

    def __init__(self, batch: Batch, count: int, clock: Clock) -> None:
        self.batch, self.count, self.clock = batch, count, clock

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.count):
            self.clock.begin_step()
            yield dict(self.batch)


def _student(pair: Pair, run: Run) -> dict[str, float]:
    setting = Setting(pair, run)
    module = this_project(setting)
    clock = Clock(process_time if not run.on_gpu else lambda: now(run.device))
    rounds = run.repeat(40)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    replaced = {"converted": base.converted, "log_losses": classification.log_losses}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if run.on_gpu else "cpu",
            devices=1,
            max_steps=rounds + 2,
            max_epochs=-1,
            logger=CSVLogger(folder, name="", version=""),
            enable_model_summary=False,
            callbacks=[
                RandomState(),
                ExactResume(),
                Results(),
                RunCheckpoint(f"{folder}/checkpoints"),
                Wrapping(clock),
            ],
        )
        try:
            trainer.fit(module, Steps(setting.batch, rounds + 2, clock))
        finally:
            base.converted, classification.log_losses = replaced["converted"], replaced["log_losses"]
    return _show(pair, clock.steps[1:-1])  # not the first, which warms up, nor the last, with the end of the run


class Wrapping(Callback):
    """Wraps all functions when training begins.

    Args:
        clock: the clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Wrap what trainer and module consist of."""
        module: DistillationModule = pl_module
        wrap = self.clock.wrap
        for network, name in ((module.student, "student"), *((t.network, "teacher") for t in _frozen(module))):
            wrap(network, "prepare", COMPUTE, "normalization of the images")
            wrap(network, "forward", OURS, "networks: taps, features")
            wrap(network.model, "forward_features", COMPUTE, f"forward pass of the {name}")
            wrap(network.model, "forward_head", COMPUTE, f"forward pass of the {name}")
        for head in module.distiller.objective.heads.values():
            assert isinstance(head, Head)
            wrap(head, "forward", COMPUTE, "losses")
        optimizer = trainer.optimizers[0]
        wrap(module, "backward", COMPUTE, "backward pass")
        wrap(optimizer, "step", COMPUTE, "optimizer")
        wrap(optimizer, "zero_grad", COMPUTE, "optimizer")
        wrap(module, "optimizer_step", LIGHTNING, "optimizer loop: closures, hooks, precision")
        wrap(module, "training_step", OURS, "training_step")
        wrap(module.distiller, "forward", OURS, "Distiller")
        wrap(module.distiller.objective, "forward", OURS, "Objective, base class of the heads")
        wrap(module, "_progress", OURS, "progress, for schedules")
        wrap(module._guard, "check", OURS, "non-finite guard")
        wrap(base, "converted", OURS, "batch dict from what the loader yields")
        wrap(classification, "log_losses", OURS, "log_losses, less Lightning's log")
        wrap(module, "log", LIGHTNING, "self.log")
        wrap(module, "log_dict", LIGHTNING, "self.log")
        for logger in trainer.loggers:
            wrap(logger, "log_metrics", LIGHTNING, "logger")
            wrap(logger, "save", LIGHTNING, "logger")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        for callback in callbacks:
            kind = OURS if type(callback).__module__.startswith("distill") else LIGHTNING
            for name in vars(Callback):
                if name.startswith("on_") and getattr(type(callback), name) is not getattr(Callback, name):
                    wrap(callback, name, kind, f"callback {type(callback).__name__}")


def _frozen(module: DistillationModule) -> list[Any]:
    return list(module.teachers.values())


def _show(pair: Pair, steps: list[dict[tuple[str, str], float]]) -> dict[str, float]:
    """Print the parts, and return the share of each kind; all are medians over the steps."""
    keys = {key for step in steps for key in step}
    seconds = {key: median(step.get(key, 0.0) for step in steps) for key in keys}
    whole = sum(seconds.values())
    kinds = {kind: sum(time for (of, _), time in seconds.items() if of == kind) for kind in KINDS}
    rows = [
        [part, kind, f"{1e6 * time:,.0f}", f"{100 * time / whole:.2f} %"]
        for (kind, part), time in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    head = ["", "whose", "us (median)", "share"]
    CONSOLE.print(table(f"The step in Lightning: {pair.title}, {IMAGES} images, CE + KD", head, rows[:SHOWN]))
    CONSOLE.print(
        "; ".join(f"{kind} {1e6 * time:,.0f} us ({100 * time / whole:.1f} %)" for kind, time in kinds.items())
    )
    return {kind: time / whole for kind, time in kinds.items()}


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
