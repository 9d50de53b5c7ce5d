"""Every read and write of Lightning's private state, as functions named for what is wanted.

They hold for the Lightning versions that `pyproject.toml` allows, and `tests/training/test_lightning_internals.py`
checks them. Private methods that a subclass overrides stay in that subclass: in `distill.cli.program` (the parser) and
`distill.callbacks.checkpoint` (`ModelCheckpoint`).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import Strategy


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, where Lightning's own property would raise without one."""
    return module._trainer


def is_stopping(trainer: Trainer) -> bool:
    """Whether the step that was just made is the run's last one."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the batch that was just trained on made no optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that was just trained on."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def begin_next_epoch_if_resumed_after_one(trainer: Trainer) -> None:
    """Begin with the next epoch where a run is resumed from the end of one.

    Lightning does so by itself, but for a run with `max_steps`: it would go through the ended epoch once more, without
    batches. Call it in `on_train_start`.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if loop.restarting and epochs.ready == epochs.started == epochs.processed:
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # FitLoop's own setter undoes it with max_steps
        loop.reset()
        epochs.completed = epochs.processed


def end_resuming(trainer: Trainer) -> None:
    """Let schedulers that read figures take their step at the end of a resumed run's first epoch, too."""
    trainer.fit_loop._restarting = False


def count_step_before_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Count the last step in a checkpoint that is saved in a validation: Lightning counts it after that."""
    if trainer.validating and not is_accumulating(trainer):
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def let_validation_come_first(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint of a step before a validation so that the resumed run begins with it."""
    loops = checkpoint["loops"]["fit_loop"]
    for batches in (loops["epoch_loop.batch_progress"][count] for count in ("total", "current")):
        batches["completed"] = batches["processed"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # Lightning's counts in a begun validation
    loops["epoch_loop.val_loop.batch_progress"] |= {"total": begun, "current": dict(begun), "is_last_batch": False}


def forget_begun_validation(trainer: Trainer) -> None:
    """Drop the batch that `let_validation_come_first` counted."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()


def step_plateau_schedulers(trainer: Trainer) -> None:
    """Let `ReduceLROnPlateau` take the step at the end of an epoch."""
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def set_sigterm(trainer: Trainer, received: bool) -> None:
    """Change whether Lightning believes that a SIGTERM was received."""
    trainer._signal_connector.received_sigterm = received


def ddp_options(strategy: Strategy) -> dict[str, Any]:
    """Arguments that a strategy passes to `DistributedDataParallel`; empty for other strategies."""
    return getattr(strategy, "_ddp_kwargs", {})


def layer_sync(strategy: Strategy) -> LayerSync | None:
    """The replacement of layers by synchronized ones (`sync_batchnorm`) that a strategy will make."""
    return getattr(strategy, "_layer_sync", None)


def set_layer_sync(strategy: Any, sync: LayerSync) -> None:
    """Change it."""
    strategy._layer_sync = sync
