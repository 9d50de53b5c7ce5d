"""The private state of Lightning means what this project takes it for."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from distill.training import lightning_internals as internals


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Record(Callback):
    """Notes what the internals say after every batch."""

    def __init__(self):
        self.accumulating, self.due, self.stopping = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.accumulating.append(internals.is_accumulating(trainer))
        self.due.append(internals.validation_is_due(trainer))
        self.stopping.append(internals.is_stopping(trainer))


def trained(tmp_path, callback, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
        **options,
    )
    loader = DataLoader(torch.zeros(6, 1), batch_size=1)
    trainer.fit(Linear(), loader, loader)
    return trainer


def test_accumulation_validation_and_the_last_step_are_known_after_a_batch(tmp_path):
    record = Record()
    trained(tmp_path, record, max_epochs=1, accumulate_grad_batches=2, val_check_interval=3)
    assert record.accumulating == [True, False, True, False, True, False]
    assert record.due == [False, False, True, False, False, True]
    record = Record()
    trained(tmp_path, record, max_steps=4)
    assert record.stopping == [False, False, False, True]


def test_a_module_knows_whether_it_has_a_trainer(tmp_path):
    module = Linear()
    assert internals.trainer_of(module) is None
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, logger=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader(torch.zeros(2, 1)))
    assert internals.trainer_of(module) is trainer


class TermAtOnce(Callback):
    """Sends SIGTERM before the first batch, and notes after each batch whether the trainer has noticed."""

    def __init__(self, hold):
        self.hold, self.noticed = hold, []

    def setup(self, trainer, pl_module, stage):
        internals.stop_at_step_ends(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        internals.hold_sigterm(trainer, self.hold and batch_idx < 5)
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.noticed.append(trainer.received_sigterm)


@pytest.mark.parametrize(("hold", "noticed"), [(False, [False, False, True]), (True, [False] * 5 + [True])])
def test_a_sigterm_is_noticed_at_the_end_of_accumulation_unless_it_is_held(tmp_path, hold, noticed):
    term = TermAtOnce(hold)
    with pytest.raises(SIGTERMException):
        trained(tmp_path, term, max_epochs=1, accumulate_grad_batches=3)
    assert term.noticed == noticed


@pytest.mark.parametrize(("options", "expected"), [({}, None), ({"static_graph": True}, True)])
def test_the_options_of_ddp_are_those_that_were_given(options, expected):
    assert internals.ddp_options(DDPStrategy(**options)).get("static_graph") is expected


def test_the_synchronization_of_layers_can_be_replaced():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=True, logger=False)
    assert isinstance(internals.layer_sync(trainer.strategy), TorchSyncBatchNorm)
    sync = TorchSyncBatchNorm()
    internals.set_layer_sync(trainer.strategy, sync)
    assert internals.layer_sync(trainer.strategy) is sync
