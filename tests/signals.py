"""Callbacks that send SIGTERM to this process in the middle of a run, and one that records checkpoints."""

import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback


class TermAfterBatch(Callback):
    """Sends SIGTERM after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class TermInValidation(Callback):
    """Sends SIGTERM in the first validation batch after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


class TermAtEpochEnd(Callback):
    """Sends SIGTERM at the end of the epoch that ends with an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class StepsOfLast(Callback):
    """Appends the step of `last.ckpt` to a file at the start of every step."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        checkpoint = Path(trainer.checkpoint_callback.dirpath) / "last.ckpt"
        with open(self.file, "a") as file:
            file.write(f"{torch.load(checkpoint, weights_only=True)['global_step']}\n")
