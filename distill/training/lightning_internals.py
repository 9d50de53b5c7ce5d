"""Functions for all access to Lightning's private state.

They work with the Lightning versions that `pyproject.toml` allows, checked by
`tests/training/test_lightning_internals.py`. Overrides of private methods stay in their subclasses:
`distill.cli.program` (the parser), `distill.cli.trainer`, `distill.runs.csv_logger` and `distill.callbacks.checkpoint`.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, WeightAveraging
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.configuration_validator import _verify_loop_configurations
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import AveragedModel


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


def pending_row(trainer: Trainer) -> dict[str, float] | None:
    """Return the row of metrics that Lightning logs right after the present hook, with its `step`; `None` if none.

    Call it in `on_train_batch_end` or `on_train_epoch_end`, on all ranks, since metrics of an epoch are synchronized.
    """
    loop, connector = trainer.fit_loop, trainer._logger_connector
    batches: Any = loop.epoch_loop.batch_progress.current
    epochs: Any = loop.epoch_progress.current
    step = loop.epoch_loop._batches_that_stepped
    if not trainer.training:
        return None  # the row of a validation is logged before its end
    if batches.processed > batches.completed:  # a batch's end
        if is_accumulating(trainer) or not connector.should_update_logs:
            return None
    elif epochs.processed > epochs.completed:  # an epoch's end
        step -= 1
    else:
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    if not metrics:
        return None
    if "step" in metrics:  # logged by the user, it replaces Lightning's
        return {**metrics, "step": int(metrics["step"])}
    return {"epoch": trainer.current_epoch, **metrics, "step": step}


def epoch_metrics(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the sums so far of training metrics that are logged at the end of the epoch.

    Only values are included, no torchmetrics objects, whose state is their module's. Call it on all ranks.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if epochs.processed > epochs.completed:  # the epoch's end: they are logged, and begin again
        return {}
    saved = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta = metric.meta
        if metric.is_tensor and meta.on_epoch and not metric.has_reset and meta.reduce_fx.__name__ in _REDUCTIONS:
            saved[key] = {name: getattr(meta, name) for name in _DESCRIPTION} | {
                "reduction": meta.reduce_fx.__name__,
                "is_synchronized": meta.sync.should,
                "value": meta.sync(metric.value.clone()).cpu(),
            }
            if meta.is_mean_reduction:
                saved[key]["samples"] = meta.sync(metric.cumulated_batch_size.clone()).cpu()
    return saved


def add_epoch_metrics(trainer: Trainer, saved: dict[str, dict[str, Any]], epoch_is_over: bool) -> None:
    """Add the `epoch_metrics` of a checkpoint to those of the resumed epoch, and remove them from `saved`.

    Call it after every batch, since a metric exists only once it is logged; those that are not logged any more are
    created at the end of the epoch.
    """
    results: Any = trainer.fit_loop.epoch_loop._results
    for key in [key for key in saved if epoch_is_over or key in results]:
        before = saved.pop(key)
        if key not in results:
            meta = _Metadata(
                **{name: before[name] for name in _DESCRIPTION}, reduce_fx=_REDUCTIONS[before["reduction"]]
            )
            meta.sync = _Sync(_should=before["is_synchronized"], fn=trainer.strategy.reduce)
            results[key] = _ResultMetric(meta, is_tensor=True).to(trainer.strategy.root_device)
        metric = results[key]
        value = before["value"].to(metric.value)
        if before["reduction"] in ("mean", "sum"):
            metric.value = value + metric.value
        else:
            metric.value = metric.meta.reduce_fx(value, metric.value)
        if "samples" in before:
            metric.cumulated_batch_size = before["samples"].to(metric.cumulated_batch_size.device) + (
                metric.cumulated_batch_size
            )
        metric.has_reset, metric._computed, metric._update_count = False, None, max(metric._update_count, 1)


_REDUCTIONS: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "max": torch.max, "min": torch.min}
_DESCRIPTION = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)


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


class _SigtermAtStepEnds(_SignalConnector):
    """Lightning's signal connector, which reports a SIGTERM only when training can stop without losing anything.

    Attributes:
        is_held: whether a received SIGTERM is not reported yet, as it is not during the accumulation of gradients.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.is_held = self._is_agreed = False
        super().__init__(trainer)

    @property
    def received_sigterm(self) -> bool:
        """The flag that Lightning looks at; the same on all ranks."""
        is_fit = self.trainer.state.fn == "fit"
        if is_fit and (self.is_held or is_accumulating(self.trainer)):
            return False
        return self._is_agreed if is_fit and self.trainer.world_size > 1 else self._received

    @received_sigterm.setter
    def received_sigterm(self, received: bool) -> None:
        self._received = received

    def agree(self) -> None:
        """Let all ranks know whether rank 0 has received a SIGTERM."""
        flag = torch.tensor([self._received], dtype=torch.int32, device=self.trainer.strategy.root_device)
        torch.distributed.broadcast(flag, src=0)
        self._is_agreed = bool(flag.item())

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        launcher: Any = self.trainer.strategy.launcher
        if not self._received and launcher is not None:
            launcher.kill(signum)
        self._received = True  # without Lightning's broadcast, which could meet another collective of a rank


def stop_at_step_ends(trainer: Trainer) -> None:
    """Let a SIGTERM stop training only after an optimizer step, on all ranks after the same one.

    Call it before Lightning registers its signal handlers.
    """
    connector = _SigtermAtStepEnds(trainer)
    trainer._signal_connector = connector
    # Lightning's broadcast before every batch, for which `agree_on_sigterm` stands
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def agree_on_sigterm(trainer: Trainer) -> None:
    """Let all ranks stop after the same step; call it at the end of each, on all ranks."""
    connector = trainer._signal_connector
    if trainer.world_size > 1 and isinstance(connector, _SigtermAtStepEnds) and not is_accumulating(trainer):
        connector.agree()


def hold_sigterm(trainer: Trainer, hold: bool) -> None:
    """Defer a SIGTERM, or deliver the deferred one; call `stop_at_step_ends` before."""
    connector = trainer._signal_connector
    assert isinstance(connector, _SigtermAtStepEnds)
    connector.is_held = hold


def ddp_options(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy's arguments of `DistributedDataParallel`; empty for other strategies."""
    return getattr(strategy, "_ddp_kwargs", {})


def layer_sync(strategy: Strategy) -> LayerSync | None:
    """Return the plugin that replaces layers by synchronized ones (`sync_batchnorm`), or `None`."""
    return getattr(strategy, "_layer_sync", None)


def set_layer_sync(strategy: Any, sync: LayerSync) -> None:
    """Set the plugin that replaces layers by synchronized ones."""
    strategy._layer_sync = sync


def ends_with_search(callback: BatchSizeFinder) -> bool:
    """Return True if a run ends once the batch size is found, as Lightning's `Tuner` has it."""
    return callback._early_exit


def weights_average(callback: WeightAveraging) -> AveragedModel | None:
    """Return the average of a callback; `None` outside of training."""
    return callback._average_model


def set_weights_average(callback: WeightAveraging, average: AveragedModel | None) -> None:
    """Set the average of a callback, or `None`, as it is outside of training."""
    callback._average_model = average


def swap_weights(callback: WeightAveraging, module: LightningModule) -> None:
    """Exchange the weights of a module with their average, as the callback does before and after a validation."""
    callback._swap_models(module)
