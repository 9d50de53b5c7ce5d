"""Corrections that make Lightning resume a run exactly."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from distill.runs.csv_logger import ResumableCSVLogger
from distill.training import lightning_internals as internals


class ExactResume(Callback):
    """Resumes a run exactly where it stopped, and validates at its last step.

    This callback adds what Lightning skips when it resumes a run: a validation that was about to begin, and the step
    of a `ReduceLROnPlateau` at the end of an epoch. It also corrects runs with `max_steps`, which Lightning does not
    validate if they end within an epoch, and which it resumes from the end of an epoch by repeating that epoch
    without batches. It keeps what Lightning loses of the metrics: the row that is logged only after the checkpoint of
    the same step, and the sums so far of metrics that are averaged over an epoch.

    Training stops only where nothing is lost: a SIGTERM during a validation is deferred to its end, since the module
    may hold the averaged weights of an EMA until then, and a SIGTERM or another request to stop during the accumulation
    of gradients to the optimizer step.

    A checkpoint that is saved before the first step after a resume has the position of the one that was loaded, which
    Lightning has prepared for that step by then.

    Attributes:
        metrics_file: the state of `metrics.csv` when the run that is resumed last wrote to it. Checkpoints keep it
            while nothing is logged there, so that a later resume can go on.
    """

    def __init__(self) -> None:
        self.metrics_file: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        self._validation_is_due = False
        self._epoch_is_over = False
        self._metrics: dict[str, float] = {}
        self._epoch_metrics: dict[str, dict[str, Any]] = {}
        self._stop_is_due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let a SIGTERM stop training only after an optimizer step."""
        if stage == "fit":
            internals.stop_at_step_ends(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the position within the epoch and in `metrics.csv`, and the metrics that schedulers monitor."""
        row = None if self._loaded else internals.pending_row(trainer)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)]
        checkpoint["interrupted"] = {
            "validation_is_due": self._validation_is_due,
            "epoch_is_over": self._epoch_is_over,
            "is_accumulating": internals.is_accumulating(trainer),
            "epoch_metrics": {
                **self._epoch_metrics,
                **internals.epoch_metrics(trainer),
            },  # the former not yet added
            "figures": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "metrics_file": loggers[0].state(row) if loggers and trainer.is_global_zero else self.metrics_file,
        }
        if self._loaded is None:
            internals.count_step_before_validation(trainer, checkpoint)
        else:
            checkpoint["loops"] = self._loaded["loops"]
            present = {name: checkpoint["interrupted"][name] for name in ("epoch_is_over", "metrics_file")}
            checkpoint["interrupted"] = {**self._loaded["interrupted"], **present}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the position within the epoch; a validation that is due comes first."""
        position = checkpoint.get("interrupted")
        if position is None or trainer.state.fn != "fit":
            return
        self._loaded = deepcopy({"loops": checkpoint["loops"], "interrupted": position})
        self._epoch_is_over, self._metrics = position["epoch_is_over"], position["figures"]
        self._epoch_metrics = position.get("epoch_metrics", {})
        if not position["validation_is_due"]:
            return
        internals.let_validation_come_first(checkpoint)
        self._validation_is_due = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next epoch if the last one is complete, after the step of a plateau scheduler on its metrics."""
        internals.begin_next_epoch_if_resumed_after_one(trainer)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._metrics.items()})
        if self._epoch_is_over:
            internals.step_plateau_schedulers(trainer)
            self._epoch_is_over = False
        self._metrics = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer a SIGTERM, and reset the batch count that made Lightning begin with the validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._loaded = None
        internals.hold_sigterm(trainer, True)
        if self._validation_is_due:
            internals.forget_begun_validation(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that no validation is due any more."""
        self._loaded = None
        self._validation_is_due = self._epoch_is_over = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a validation at the run's last step, and note whether one is due."""
        internals.add_epoch_metrics(trainer, self._epoch_metrics, epoch_is_over=False)
        internals.agree_on_sigterm(trainer)
        self._defer_stop(trainer)
        if internals.is_stopping(trainer):
            trainer.should_stop = True  # then Lightning also validates within an epoch
        self._validation_is_due = internals.validation_is_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Deliver a deferred SIGTERM."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validation_is_due = False
        self._defer_stop(trainer)
        internals.hold_sigterm(trainer, False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is complete, and let plateau schedulers step after a resumed run's first epoch, too."""
        self._epoch_is_over = True
        internals.add_epoch_metrics(trainer, self._epoch_metrics, epoch_is_over=True)
        internals.end_resuming(trainer)

    def _defer_stop(self, trainer: Trainer) -> None:
        """Defer a request to stop, such as that of `max_time`, while gradients are accumulated."""
        if internals.is_accumulating(trainer):
            self._stop_is_due |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_is_due:
            trainer.should_stop = True
            self._stop_is_due = False
