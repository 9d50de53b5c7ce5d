"""Corrections that make Lightning resume a run exactly."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from distill.training import lightning_internals as internals


class ExactResume(Callback):
    """Resumes a run exactly where it stopped, and validates at its last step.

    This callback adds what Lightning skips when it resumes a run: a validation that was about to begin, and the step
    of a `ReduceLROnPlateau` at the end of an epoch. It also corrects runs with `max_steps`, which Lightning does not
    validate if they end within an epoch, and which it resumes from the end of an epoch by repeating that epoch
    without batches. A SIGTERM during a validation is deferred to the end of the validation, since the module may hold
    the averaged weights of an EMA until then.
    """

    def __init__(self) -> None:
        self._validation_is_due = False
        self._epoch_is_over = False
        self._metrics: dict[str, float] = {}
        self._sigterm_deferred = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the position within the epoch and the metrics that schedulers monitor."""
        checkpoint["interrupted"] = {
            "validation_is_due": self._validation_is_due,
            "epoch_is_over": self._epoch_is_over,
            "figures": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        internals.count_step_before_validation(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the position within the epoch; a validation that is due comes first."""
        position = checkpoint.get("interrupted")
        if position is None or trainer.state.fn != "fit":
            return
        self._epoch_is_over, self._metrics = position["epoch_is_over"], position["figures"]
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
        self._metrics = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the batch count that made Lightning begin with the validation."""
        if self._validation_is_due and not trainer.sanity_checking:
            internals.forget_begun_validation(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that no validation is due any more."""
        self._validation_is_due = self._epoch_is_over = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a validation at the run's last step, and note whether one is due."""
        if internals.is_stopping(trainer):
            trainer.should_stop = True  # then Lightning also validates within an epoch
        self._validation_is_due = internals.validation_is_due(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Defer a SIGTERM, which would interrupt the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.received_sigterm:
            internals.set_sigterm(trainer, False)
            self._sigterm_deferred = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Deliver a deferred SIGTERM."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validation_is_due = False
        if self._sigterm_deferred:
            internals.set_sigterm(trainer, True)
            self._sigterm_deferred = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is complete, and let plateau schedulers step after a resumed run's first epoch, too."""
        self._epoch_is_over = True
        internals.end_resuming(trainer)
