"""Callbacks that send this process a signal in the middle of a run, as a scheduler would."""

import os
import signal

from lightning.pytorch import Callback


class TermAfterBatch(Callback):
    """SIGTERM after an optimiser step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class TermInValidation(Callback):
    """SIGTERM after the first of the validation batches that follow an optimiser step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
