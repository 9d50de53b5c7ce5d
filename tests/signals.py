"""Callbacks that send SIGTERM to this process in the middle of a run, and one that records checkpoints."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from distill.runs.checkpoints import AtomicCheckpointIO


class KillAfterSave(AtomicCheckpointIO):
    """Kills this process right after it has renamed the `save`-th checkpoint."""

    def __init__(self, save: int) -> None:
        self.save = save

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.save -= 1
        if self.save == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class KillAfterFirstSave(AtomicCheckpointIO):
    """Kills this process right after it has renamed the first checkpoint in a folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        is_first = not any(Path(path).parent.glob("*.ckpt"))
        super().save_checkpoint(checkpoint, path, storage_options)
        if is_first:
            os.kill(os.getpid(), signal.SIGKILL)


class LogOverEpochs(Callback):
    """Logs values that are averaged over an epoch, one at every batch and one only at the first."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        index = batch["index"].float()
        pl_module.log("index/mean", index.mean(), on_step=False, on_epoch=True, batch_size=len(index))
        pl_module.log("index/max", index.max(), on_step=True, on_epoch=True, reduce_fx=torch.max)
        if batch_idx == 0:
            pl_module.log("index/first", index[0], on_step=False, on_epoch=True, reduce_fx=torch.sum)


class FailBefore(Callback):
    """Raises an AttributeError in one of the hooks before training."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fail("setup")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fail("on_fit_start")

    def _fail(self, hook: str) -> None:
        if hook == self.hook:
            raise AttributeError("no such attribute")


class TermInAccumulation(Callback):
    """Sends SIGTERM on rank 0 before a batch or two, which may lie in the middle of accumulation."""

    def __init__(self, batch: int, again: int = -1) -> None:
        self.batches = batch, again

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx in self.batches and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)


class TermAfterBatch(Callback):
    """Sends SIGTERM after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class RequeueAfterBatch(Callback):
    """Sends the signal at which Lightning requeues a job on SLURM, after the first optimizer step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


class TermInValidation(Callback):
    """Sends SIGTERM in the first validation batch after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


class TermAtEpochEnd(Callback):
    """Sends SIGTERM at the end of the epoch that ends with an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class StepsOfLast(Callback):
    """Appends the step of `last.ckpt` to a file at the start of every step."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        checkpoint = Path(getattr(trainer.checkpoint_callback, "dirpath", "")) / "last.ckpt"
        with open(self.file, "a") as file:
            file.write(f"{torch.load(checkpoint, weights_only=True)['global_step']}\n")
