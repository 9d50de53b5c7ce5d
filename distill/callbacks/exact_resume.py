"""Mends how Lightning resumes a run, so that it goes on exactly where it was."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from distill.training import lightning_internals as internals


class ExactResume(Callback):
    """Makes a resumed run go on exactly where it was, and validates at the run's last step.

    A SIGTERM during a validation waits for its end. (The averaged weights of an EMA are in the module's place then.)
    Lightning leaves out two things when it resumes a run, which come here: the validation that was about to begin,
    and the step of a `ReduceLROnPlateau` at the end of the epoch. With `max_steps` it would also begin the epoch after
    the one that was over at the end of it. And where `max_steps` ends a run within an epoch, it would not validate.
    """

    def __init__(self) -> None:
        self._validation_is_due = False
        self._epoch_is_over = False
        self._figures: dict[str, float] = {}
        self._signalled = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where in the epoch the run is, and the figures that schedulers look at."""
        checkpoint["interrupted"] = {
            "validation_is_due": self._validation_is_due,
            "epoch_is_over": self._epoch_is_over,
            "figures": {name: float(figure) for name, figure in trainer.callback_metrics.items()},
        }
        internals.count_step_before_validation(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the validation come first, if it is due."""
        place = checkpoint.get("interrupted")
        if place is None or trainer.state.fn != "fit":
            return
        self._epoch_is_over, self._figures = place["epoch_is_over"], place["figures"]
        if not place["validation_is_due"]:
            return
        internals.let_validation_come_first(checkpoint)
        self._validation_is_due = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next epoch if the last one was over, after the step of a scheduler that looks at its figures."""
        internals.begin_next_epoch_if_resumed_after_one(trainer)
        trainer.callback_metrics.update({name: torch.tensor(figure) for name, figure in self._figures.items()})
        if self._epoch_is_over:
            internals.step_plateau_schedulers(trainer)
        self._figures = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the batch that stood for a validation that was begun."""
        if self._validation_is_due and not trainer.sanity_checking:
            internals.forget_begun_validation(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A validation that was due is over, or was none."""
        self._validation_is_due = self._epoch_is_over = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a validation at the run's last step, and note whether one is due."""
        if internals.is_stopping(trainer):
            trainer.should_stop = True  # Lightning then validates within an epoch, too
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
        """Hold a signal back, which would end the validation in the middle."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.received_sigterm:
            internals.set_sigterm(trainer, False)
            self._signalled = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a signal through that was held back."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validation_is_due = False
        if self._signalled:
            internals.set_sigterm(trainer, True)
            self._signalled = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let schedulers look at the figures after the first epoch of a resumed run, too."""
        self._epoch_is_over = True
        internals.end_resuming(trainer)
