"""Measurements of the terms' gradients in the first steps of a run that then ends."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distill.callbacks.gradient_meter import FILLED, At, GradientMeter, filled_memories
from distill.errors import UserError
from distill.gradients import Measurement
from distill.objective import Objective
from distill.training.run_info import progress_of


class Weighing(GradientMeter):
    """Trains for some steps, measures all terms in the next ones, and ends the run.

    The first steps go on until the memories of all heads are filled, or until only the steps to measure are left of
    the run.

    Args:
        steps: number of steps to measure.
        warmup: number of steps before them.
        at: where the gradients are compared.
        show_progress: whether to show a progress bar on standard error.

    Attributes:
        measurements: the measurements so far.
        first: the first measured step.
        memories: the filled share of each memory at the last step before the measurements, by term name.

    Raises:
        UserError: the run is shorter than `warmup` + `steps`.
    """

    def __init__(self, steps: int = 50, warmup: int = 20, at: At = "parameters", show_progress: bool = True) -> None:
        super().__init__(at)
        self.steps, self.warmup = steps, warmup
        self.measurements: list[Measurement] = []
        self.first: int | None = None
        self.memories: dict[str, float] = {}
        self._probed = False
        self._show_progress = show_progress
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the length of the run, and show the progress."""
        super().on_train_start(trainer, pl_module)
        length = progress_of(trainer, 0).steps
        if length is not None and length < self.warmup + self.steps:
            raise UserError(
                f"steps: the run has {length} optimizer steps, fewer than the {self.warmup} of the warm-up and the "
                f"{self.steps} to measure: give fewer with --warmup and --steps, or a longer run"
            )
        self._last_start = inf if length is None else length - self.steps
        if self._show_progress and trainer.is_global_zero:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("warm-up", total=self.warmup)

    def is_measured(self, trainer: Trainer, objective: Objective) -> bool:
        """Measure once the warm-up is over and the memories are filled; and once at first, to find broken gradients."""
        if self.first is None and trainer.global_step >= self.warmup:
            self.memories = dict(filled_memories(objective))
            waiting = [name for name, share in self.memories.items() if share < FILLED]
            if not waiting or trainer.global_step >= self._last_start:
                self.first = trainer.global_step
                self._show("measuring", 0, self.steps)
            else:
                share = min(self.memories.values())
                self._show(f"filling {_memory_of(waiting)} (%)", round(100 * share), round(100 * FILLED))
        elif self.first is None:
            self._show("warm-up", trainer.global_step, self.warmup)
        is_probe, self._probed = not self._probed, True
        return self.first is not None or is_probe

    def on_measured(self, trainer: Trainer, objective: Objective, measurement: Measurement) -> None:
        """Keep the measurement; end the run after the last one."""
        if self.first is None:
            return
        if measurement.products:  # at the first steps in float16, all terms may overflow
            self.measurements.append(measurement)
        self._show("measuring", len(self.measurements), self.steps)
        if len(self.measurements) == self.steps:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the progress bar."""
        super().on_train_end(trainer, pl_module)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the progress bar."""
        super().on_exception(trainer, pl_module, exception)
        self._stop()

    def error(self, message: str) -> UserError:
        """Return an error without the name of this callback, which no configuration contains."""
        return UserError(message)

    def _show(self, description: str, completed: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=description, completed=completed, total=total)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _memory_of(names: Sequence[str]) -> str:
    return f"the memor{'y' if len(names) == 1 else 'ies'} of {', '.join(names)}"
