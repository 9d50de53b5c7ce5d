"""Callbacks that send SIGTERM to this process in the middle of a run, and one that records checkpoints."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class TermAfterBatch(Callback):
    """Sends SIGTERM after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


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
