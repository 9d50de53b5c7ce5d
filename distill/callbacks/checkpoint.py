"""Checkpoints of a run: its latest state, and the best by a monitored metric."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from distill.training.lightning_internals import is_accumulating, is_stopping, validation_is_due


class RunCheckpoint(ModelCheckpoint):
    """Saves the latest state as `last.ckpt`, and the best checkpoints by a monitored metric.

    `last.ckpt` is written when training begins, at the end of every epoch (after its validation), after a validation
    within an epoch, at each configured interval, at SIGTERM and at the end, independent of the monitored metric. It
    can always be resumed. The other files are those of Lightning's `ModelCheckpoint`: the best `save_top_k` by
    `monitor`, compared at the end of every epoch and after each validation; without a monitor, one file each time.

    An interval (`every_n_train_steps`, `train_time_interval`) adds to the saves at the ends of epochs and replaces
    none of them. Validation metrics are not compared at an interval, since they belong to an earlier step; if all
    checkpoints are kept (`save_top_k` -1), the interval adds a file.

    Args:
        dirpath: the folder; on the command line, defaults to `checkpoints` in the run's folder.
        filename: name of the best checkpoints without the suffix; may contain metrics such as `{epoch}` and `{step}`.
            If several are kept, `-{step}` is added to a name without the step, so that none overwrites another.
        monitor: the metric to compare; `null` for none. `auto` takes the module's own (see `monitor` of
            `ClassificationModule`): `val/top1`, and without labels `val/neighbor_agreement`.
        mode: `max` or `min`, whichever is better; with `auto`, the module's own.
        save_top_k: number of best checkpoints to keep; -1 for all, 0 for none.
        every_n_train_steps: interval in optimizer steps; `null` for none.
        train_time_interval: interval in time; `null` for none.
        every_n_epochs: number of epochs between two comparisons of the metric.
        save_weights_only: whether the best checkpoints omit the training state.
        verbose: whether to report each save.
        auto_insert_metric_name: whether to put the names of metrics into file names.
        save_on_exception: whether to save when training fails.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = "best",
        monitor: str | None = "auto",
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
        if filename and save_top_k not in (0, 1) and re.search(r"\{step[:}]", filename) is None:
            filename += "-{step}"  # saved at most once
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
        self._step_interval = every_n_train_steps or 0
        self._time_interval = train_time_interval
        self._last_step: int | None = None  # optimizer step of `last.ckpt`
        self._validated_step: int | None = None
        self._last_is_due = False
        self._best_is_due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the module's metric if none is named."""
        if self.monitor == "auto":
            self.monitor, self.mode = getattr(pl_module, "monitor", ("val/top1", "max"))
            self.kth_value = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it omits the intervals, which a resumed run may change."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best checkpoints so far, even if the run's folder was moved."""
        old_folder, folder = state_dict.get("dirpath"), self.dirpath
        best = state_dict.get("best_model_path")
        if old_folder and folder and old_folder != folder and best and (Path(folder) / Path(best).name).exists():
            state_dict = {name: _moved(value, str(old_folder), str(folder)) for name, value in state_dict.items()}
        super().load_state_dict(state_dict)
        if 0 < self.save_top_k < len(self.best_k_models):  # the run has kept more of them before
            ranked = sorted(self.best_k_models, key=self._score, reverse=self.mode == "max")[: self.save_top_k]
            self.best_k_models = {path: score for path, score in self.best_k_models.items() if path in ranked}
            self.kth_best_model_path, self.kth_value = ranked[-1], self.best_k_models[ranked[-1]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before the first step, so that a run killed at any moment can be resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 or not self._has_checkpoints(trainer):  # it may continue one from elsewhere
            self._save_last(trainer)
        else:
            self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at an interval, at SIGTERM, and when training stops within an epoch."""
        if is_accumulating(trainer) or self._last_step == trainer.global_step:
            return  # the gradients accumulated so far are in no checkpoint
        is_final = is_stopping(trainer)
        is_over = self._is_interval_over(trainer)
        takes_best = is_over and (self.save_top_k == -1 or not self._monitors_validation)
        if validation_is_due(trainer):
            if is_final:
                return  # the last step is saved after its validation
        elif trainer.is_last_batch:
            self._best_is_due = takes_best
            return  # the epoch's end follows
        if is_over or is_final or self._last_is_due or trainer.received_sigterm:
            if takes_best:
                self._save_best(trainer)
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation within an epoch; `on_train_epoch_end` saves after one at the end."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated_step = trainer.global_step
        if not trainer.is_last_batch:
            self._save_best(trainer)
            if is_accumulating(trainer):
                self._last_is_due = True
            else:
                self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after its validation."""
        if not trainer.is_last_batch and self._last_step == trainer.global_step:
            return  # saved within the epoch, which continues if the run is extended
        is_known = not self._monitors_validation or self._validated_step == trainer.global_step
        is_compared = is_known and self._every_n_epochs > 0 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if is_compared or self._best_is_due:
            self._save_best(trainer)
        self._best_is_due = False
        self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: training always ends with the end of an epoch, which has been saved."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save at a SIGTERM that is noticed only between two steps."""
        if isinstance(exception, SIGTERMException):
            if trainer.training and self._last_step != trainer.global_step:
                self._save_last(trainer)
            return
        super().on_exception(trainer, pl_module, exception)

    def _score(self, path: str) -> float:
        return float(self.best_k_models[path])

    @property
    def _monitors_validation(self) -> bool:
        return self.monitor is not None and self.monitor.startswith("val/")

    def _has_checkpoints(self, trainer: Trainer) -> bool:
        """Return True if the folder holds checkpoints; the same on all ranks."""
        found = trainer.is_global_zero and any(Path(str(self.dirpath)).glob("*.ckpt"))
        return trainer.strategy.reduce_boolean_decision(found, all=False)

    def _is_interval_over(self, trainer: Trainer) -> bool:
        is_over = self._step_interval > 0 and trainer.global_step % self._step_interval == 0 and trainer.global_step > 0
        if self._time_interval is not None:
            now = time.monotonic()
            is_late = now - (self._last_time_checked or now) >= self._time_interval.total_seconds()
            if trainer.strategy.broadcast(is_late):
                self._last_time_checked = now
                return True
        return is_over

    def _save_best(self, trainer: Trainer) -> None:
        """Save the checkpoints other than `last.ckpt`, unless already saved at this step."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        metrics = self._monitor_candidates(trainer)
        if self.save_top_k == -1 and self.monitor not in metrics:  # all are kept, so no metric is needed
            self._save_none_monitor_checkpoint(trainer, metrics)
        else:
            self._save_topk_checkpoint(trainer, metrics)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's Trainer has it
            return
        self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
        self._last_step = trainer.global_step
        self._last_is_due = False
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._save_last(trainer)


def run_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the run's own checkpoint callback; among others, the first of a user's if there is none."""
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return next((callback for callback in found if isinstance(callback, RunCheckpoint)), found[0] if found else None)


def _moved(value: Any, old_folder: str, folder: str) -> Any:
    """Move the paths in a saved state to another folder."""
    if isinstance(value, dict):
        return {_moved(name, old_folder, folder): score for name, score in value.items()}
    if isinstance(value, str) and (value == old_folder or value.startswith(old_folder + os.sep)):
        return folder + value[len(old_folder) :]
    return value
