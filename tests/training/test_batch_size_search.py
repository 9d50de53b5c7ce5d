"""Lightning's search for a batch size is refused where the run that follows would be another one than asked for."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from torch import nn

from distill.callbacks import SuperpixelSegments
from distill.data import Digits
from distill.errors import UserError
from distill.heads import SeRKD
from distill.networks import TorchModule
from distill.objective import Term
from distill.training.distillation import DistillationModule


def network():
    layers = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)
    return TorchModule(nn.Sequential(*layers), tokens="1")


def module_of(data, **settings):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return DistillationModule(student=network(), teacher=network(), optimizer=optimizer, data=data, **settings)


def trainer_in(folder, *callbacks):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits = {"max_epochs": 1, "limit_val_batches": 0, "limit_train_batches": 1, "enable_model_summary": False}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **limits, **quiet)


def search():
    return BatchSizeFinder(steps_per_trial=1, init_val=8, max_trials=2)


SEGMENTS = {"heads": {"serkd": Term(SeRKD(superpixels="segments", count=4))}}


@pytest.mark.parametrize(
    ("settings", "callbacks", "message"),
    [
        ({"lr_scaling": "linear"}, [], "changes the batch size after model.lr_scaling, 'linear', has scaled"),
        (
            SEGMENTS,
            [SuperpixelSegments(segments=4)],
            "heads.serkd needs the segments of SuperpixelSegments: leave",
        ),
    ],
)
def test_a_search_that_changes_the_run_is_refused_before_it_begins(settings, callbacks, message, tmp_path):
    data = Digits(batch_size=4, image_size=8)
    with pytest.raises(UserError, match=rf"^trainer\.callbacks: BatchSizeFinder .*{message}"):
        trainer_in(tmp_path, search(), *callbacks).fit(module_of(data, **settings), data)
    assert data.batch_size == 4
    assert not list(tmp_path.iterdir())


def test_a_search_that_changes_nothing_else_works(tmp_path):
    data = Digits(batch_size=4, image_size=8)
    trainer_in(tmp_path, search()).fit(module_of(data), data)
    assert data.batch_size == 16


def test_a_scaled_learning_rate_follows_a_search_of_its_own(tmp_path):
    data = Digits(batch_size=4, image_size=8)
    module = module_of(data, lr_scaling="linear", lr_base_size=8)
    trainer = trainer_in(tmp_path)
    assert Tuner(trainer).scale_batch_size(module, datamodule=data, steps_per_trial=1, init_val=8, max_trials=2) == 16
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_search_in_a_run_that_resumes_is_refused_since_lightning_forgets_the_optimizer(tmp_path):
    data = Digits(batch_size=4, image_size=8)
    first = trainer_in(tmp_path)
    first.fit(module_of(data), data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="BatchSizeFinder would let a resumed run begin at step 0 with a new optimizer"):
        trainer_in(tmp_path, search()).fit(module_of(data), data, ckpt_path=tmp_path / "last.ckpt")
    assert data.batch_size == 4
