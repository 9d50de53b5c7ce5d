"""Functions for all access to Lightning's private state.

They work with the Lightning versions that `pyproject.toml` allows, checked by
`tests/training/test_lightning_internals.py`. Overrides of private methods stay in their subclasses:
`distill.cli.program` (the parser) and `distill.callbacks.checkpoint` (`ModelCheckpoint`).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.configuration_validator import _verify_loop_configurations
from lightning.pytorch.trainer.states import TrainerFn


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that a module is attached to, or `None`, for which Lightning's own property raises."""
    return module._trainer


def set_up_fit(trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
    """Set up a training run as `Trainer.fit` does, in this process alone, without a device, a log or a checkpoint.

    The data, the callbacks and the module run their `setup`, and the strategy makes optimizers and schedulers.
    """
    trainer.state.fn, trainer.training = TrainerFn.FITTING, True
    limits = trainer.min_steps, trainer.max_steps, trainer.min_epochs, trainer.max_epochs
    trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs = _parse_loop_limits(*limits, trainer)
    trainer._data_connector.attach_data(module, datamodule=data)
    trainer.strategy.connect(module)
    trainer._callback_connector._attach_model_callbacks()
    trainer._callback_connector._attach_model_logging_functions()
    _verify_loop_configurations(trainer)
    trainer._data_connector.prepare_data()
    loggers, trainer.loggers = trainer.loggers, []  # which would create their files
    try:
        call._call_setup_hook(trainer)
    finally:
        trainer.loggers = loggers
    call._call_configure_model(trainer)
    optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = optimizers, schedulers


def is_stopping(trainer: Trainer) -> bool:
    """Return True if the step just made is the run's last."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def is_accumulating(trainer: Trainer) -> bool:
    """Return True if the last batch made no optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Return True if a validation follows the last batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def begin_next_epoch_if_resumed_after_one(trainer: Trainer) -> None:
    """Begin the next epoch if a run is resumed from the end of one; call this in `on_train_start`.

    Lightning does so itself, except in a run with `max_steps`, which would repeat the complete epoch without batches.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if loop.restarting and epochs.ready == epochs.started == epochs.processed:
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # FitLoop's own setter reverts it with max_steps
        loop.reset()
        epochs.completed = epochs.processed


def end_resuming(trainer: Trainer) -> None:
    """End Lightning's restarting state, so that plateau schedulers also step after a resumed run's first epoch."""
    trainer.fit_loop._restarting = False


def count_step_before_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Count the last step in a checkpoint saved during a validation, since Lightning counts it only afterwards."""
    if trainer.validating and not is_accumulating(trainer):
        checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def let_validation_come_first(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint saved before a validation so that the resumed run begins with that validation."""
    loops = checkpoint["loops"]["fit_loop"]
    for batches in (loops["epoch_loop.batch_progress"][count] for count in ("total", "current")):
        batches["completed"] = batches["processed"]
    started = {
        "ready": 1,
        "started": 1,
        "processed": 0,
        "completed": 0,
    }  # Lightning's counts at the start of a validation
    loops["epoch_loop.val_loop.batch_progress"] |= {"total": started, "current": dict(started), "is_last_batch": False}


def forget_begun_validation(trainer: Trainer) -> None:
    """Reset the count of validation batches that `let_validation_come_first` has set."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()


def step_plateau_schedulers(trainer: Trainer) -> None:
    """Make the step of `ReduceLROnPlateau` at the end of an epoch."""
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def set_sigterm(trainer: Trainer, received: bool) -> None:
    """Set Lightning's flag of a received SIGTERM."""
    trainer._signal_connector.received_sigterm = received


def ddp_options(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy's arguments of `DistributedDataParallel`; empty for other strategies."""
    return getattr(strategy, "_ddp_kwargs", {})


def layer_sync(strategy: Strategy) -> LayerSync | None:
    """Return the plugin that replaces layers by synchronized ones (`sync_batchnorm`), or `None`."""
    return getattr(strategy, "_layer_sync", None)


def set_layer_sync(strategy: Any, sync: LayerSync) -> None:
    """Set the plugin that replaces layers by synchronized ones."""
    strategy._layer_sync = sync
