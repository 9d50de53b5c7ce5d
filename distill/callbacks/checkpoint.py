"""The checkpoints of a run: its last state at any time, and the best by a monitored figure."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from distill.training.lightning_internals import is_stopping, validation_is_due


class RunCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt`, which is always the last, and the best by a monitored figure.

    `last.ckpt` is written when training begins, at the end of every epoch (after its validation), after a validation
    within an epoch, at each interval that is asked for, at SIGTERM and at the end, whatever the monitor says. It can
    always be resumed. The other files are those of Lightning's `ModelCheckpoint`: the best `save_top_k` by `monitor`,
    compared at the end of every epoch and after a validation; without a monitor, one at each of these moments.

    An interval (`every_n_train_steps`, `train_time_interval`) adds to the saves at the ends of epochs and replaces
    none. A figure of the validation is not compared there, since it would be that of an earlier step; where all are
    kept (`save_top_k` -1), the interval adds a file.

    Args:
        dirpath: the folder; `checkpoints` in the run's folder on the command line.
        filename: of the best, without the suffix; figures may stand in it, as `{epoch}` and `{step}`.
        monitor: the figure that is compared; `null` for none.
        mode: whether its best is the `max` or the `min`.
        save_top_k: how many of the best are kept; -1 for all, 0 for none.
        every_n_train_steps: an interval in optimizer steps.
        train_time_interval: an interval in time.
        every_n_epochs: how many epochs apart the figure is compared.
        save_weights_only: whether the best are without the state of training.
        verbose: whether each save is told.
        auto_insert_metric_name: whether names of figures are put into file names.
        save_on_exception: whether to save when training fails.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = "best",
        monitor: str | None = "val/top1",
        mode: str = "max",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_weights_only: bool = False,
        verbose: bool = False,
        auto_insert_metric_name: bool = True,
        save_on_exception: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            every_n_epochs=1 if every_n_epochs is None else every_n_epochs,
            save_weights_only=save_weights_only,
            verbose=verbose,
            auto_insert_metric_name=auto_insert_metric_name,
            save_on_exception=save_on_exception,
            save_last=True,
            enable_version_counter=False,
        )
        self._steps_apart = every_n_train_steps or 0
        self._time_apart = train_time_interval
        self._last_step: int | None = None  # the optimizer step of `last.ckpt`
        self._validated_step: int | None = None

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: the same for all intervals, so that these may change on a resume."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume with the best so far, also if the run's folder was moved."""
        before, here = state_dict.get("dirpath"), self.dirpath
        best = state_dict.get("best_model_path")
        if before and here and before != here and best and (Path(here) / Path(best).name).exists():
            state_dict = {name: _moved(value, str(before), str(here)) for name, value in state_dict.items()}
        super().load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before the first step, so that a run which is killed at any moment can be resumed."""
        super().on_train_start(trainer, pl_module)
        self._last_step = None if trainer.global_step == 0 else trainer.global_step
        if trainer.global_step == 0:
            self._save_last(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at an interval, at SIGTERM, and where training stops within an epoch."""
        if self._last_step == trainer.global_step:  # of an accumulation that goes on
            return
        is_final = is_stopping(trainer)
        if is_final and validation_is_due(trainer):
            return  # what is saved of the last step comes after its validation
        signalled = trainer.received_sigterm and trainer.world_size == 1
        if self._is_interval_over(trainer) or signalled or (is_final and not trainer.is_last_batch):
            if not signalled and (self.save_top_k == -1 or not self._is_of_validation):
                self._save_best(trainer)
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation within an epoch; `on_train_epoch_end` saves after the one at its end."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_step = trainer.global_step
        if not trainer.is_last_batch:
            self._save_best(trainer)
            self._save_last(trainer)
        elif trainer.received_sigterm and trainer.world_size == 1:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after its validation."""
        if not trainer.is_last_batch and self._last_step == trainer.global_step:
            return  # the epoch goes on when the run is made longer: it was saved before its end
        is_known = not self._is_of_validation or self._validated_step == trainer.global_step
        if is_known and self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save_best(trainer)
        self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave all as it is: every end of training is that of an epoch."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save at a SIGTERM that was noticed between two steps, on several ranks always here."""
        if isinstance(exception, SIGTERMException):
            if trainer.training and self._last_step != trainer.global_step:
                self._save_last(trainer)
            return
        super().on_exception(trainer, pl_module, exception)

    @property
    def _is_of_validation(self) -> bool:
        return self.monitor is not None and self.monitor.startswith("val/")

    def _is_interval_over(self, trainer: Trainer) -> bool:
        over = self._steps_apart > 0 and trainer.global_step % self._steps_apart == 0 and trainer.global_step > 0
        if self._time_apart is not None:
            now = time.monotonic()
            late = now - (self._last_time_checked or now) >= self._time_apart.total_seconds()
            if trainer.strategy.broadcast(late):
                self._last_time_checked = now
                return True
        return over

    def _save_best(self, trainer: Trainer) -> None:
        """Save the files besides `last.ckpt`, unless they were saved at this step."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        figures = self._monitor_candidates(trainer)
        if self.save_top_k == -1 and self.monitor not in figures:  # all are kept, whatever they will be worth
            self._save_none_monitor_checkpoint(trainer, figures)
        else:
            self._save_topk_checkpoint(trainer, figures)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's Trainer has it
            return
        self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        trainer.save_checkpoint(self.last_model_path)
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._save_last(trainer)


def _moved(value: Any, before: str, here: str) -> Any:
    """The paths in a saved state, below another folder."""
    if isinstance(value, dict):
        return {_moved(name, before, here): score for name, score in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return here + value[len(before) :]
    return value
