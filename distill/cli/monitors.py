"""The metrics that a run will log, and those that its callbacks and its scheduler wait for."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torchmetrics import MetricCollection

from distill.callbacks import KNNProbe, RunCheckpoint
from distill.callbacks.checkpoint import run_checkpoint
from distill.errors import UserError, did_you_mean
from distill.training.classification import ClassificationModule
from distill.training.comparison import DISTILLATION


def refuse_unknown_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a monitored metric that the run never logs, before its first step.

    A run with a callback, a module or a head of the user may log anything, and is not checked.

    Raises:
        UserError: the message names the key of the monitor and similar metrics.
    """
    if not isinstance(module, ClassificationModule) or not _is_known(trainer, module):
        return
    known = set(logged_metrics(trainer, module))
    heads = tuple(f"train/{name}/" for name in module.terms)  # whose diagnostics are known only after a step
    validates = trainer.limit_val_batches != 0
    for key, name in _monitors(trainer, module):
        if name.startswith("val/") and not validates and key != "checkpoint.monitor":  # which then compares nothing
            raise UserError(f"{key} is {name!r}, but trainer.limit_val_batches is 0, so that nothing is validated")
        if name not in known and not name.startswith(heads):
            raise UserError(f"{key} cannot be {name!r}, which is not logged: {did_you_mean(name, known, limit=12)}")
    _refuse_rare_probes(trainer, module)


def logged_metrics(trainer: Trainer, module: ClassificationModule) -> Iterator[str]:
    """Yield the names of the metrics that a run logs in training and validation."""
    yield from ("train/loss", "train/lr", "epoch", "step")
    for name in module.terms:
        yield from (f"train/{name}", f"train/{name}_weight", f"train/{name}_weighted")
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    if any(getattr(callback, "adds_to_batch", None) == "segments" for callback in callbacks):
        yield "train/superpixels_ms"
    if getattr(module, "distillation_mean", None) is not None:
        yield f"val/{DISTILLATION}"
    for callback in callbacks:
        yield from getattr(callback, "logs", ())
    for collection in module.modules():
        if isinstance(collection, MetricCollection):
            yield from (str(name) for name, _ in collection.items() if str(name).startswith("val/"))


def _monitors(trainer: Trainer, module: ClassificationModule) -> Iterator[tuple[str, str]]:
    """Yield the key and the metric of everything that monitors one."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str):
            continue
        if isinstance(callback, RunCheckpoint):
            if callback.save_top_k != 0:
                yield "checkpoint.monitor", monitor
        elif not isinstance(callback, EarlyStopping) or callback.strict:
            yield f"trainer.callbacks: {type(callback).__name__}.monitor", monitor
    for scheduler in trainer.lr_scheduler_configs:
        if scheduler.reduce_on_plateau and scheduler.strict and scheduler.monitor is not None:
            yield "model.scheduler.monitor", scheduler.monitor


def _refuse_rare_probes(trainer: Trainer, module: ClassificationModule) -> None:
    """Refuse to monitor a figure of `KNNProbe` in epochs without a probe, after which it is missing."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    for probe in (callback for callback in callbacks if isinstance(callback, KNNProbe)):
        every = probe.every_n_epochs
        for key, name in _monitors(trainer, module):
            if name in probe.logs and _epochs_between_comparisons(trainer, key) % every:
                less = ", or checkpoint.every_n_epochs to a multiple of it" if key == "checkpoint.monitor" else ""
                raise UserError(
                    f"{key} is {name!r}, which KNNProbe.every_n_epochs {every} leaves out of some of the validations: "
                    f"set that to 1{less}"
                )


def _epochs_between_comparisons(trainer: Trainer, key: str) -> int:
    """Return the number of epochs after which a metric of the validation is compared again."""
    validated: int = trainer.check_val_every_n_epoch or 1  # none: after a number of batches, in any epoch
    checkpoint = run_checkpoint(trainer)
    if key != "checkpoint.monitor" or checkpoint is None or not _validates_at_ends(trainer):
        return validated
    return 0 if checkpoint.save_top_k == -1 else lcm(validated, checkpoint.every_n_epochs or 0)  # all kept, or none


def _validates_at_ends(trainer: Trainer) -> bool:
    """Return True if validations are at the ends of epochs only."""
    interval: Any = getattr(trainer, "val_check_interval", None)  # 1 is a batch, 1.0 an epoch; none if it is a time
    return trainer.check_val_every_n_epoch is not None and isinstance(interval, float) and interval == 1.0


def _is_known(trainer: Trainer, module: ClassificationModule) -> bool:
    """Return True if all that might log is of this project or of Lightning."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    return all(
        type(item).__module__.partition(".")[0] in ("distill", "lightning", "torch") for item in (module, *callbacks)
    )
