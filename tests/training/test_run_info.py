"""Steps and epochs: an epoch has ceil(batches / accumulation) optimizer steps, each the mean over its batches."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from distill.data import Digits
from distill.errors import UserError
from distill.heads.kd import KD
from distill.networks.torch_module import TorchModule
from distill.objective import Term
from distill.schedules import After, Until, Warmup
from distill.training.classification import ClassificationModule
from distill.training.distillation import DistillationModule
from distill.training.run_info import progress_of, require_trainable
from tests.nets import Plain
from tests.training.test_modules import SETTINGS, fit


def trainer_with(batches, epochs=-1, max_steps=-1, accumulated=1, scheduling=None):
    callbacks = [] if scheduling is None else [GradientAccumulationScheduler(scheduling)]
    return SimpleNamespace(
        train_dataloader=object(),
        num_training_batches=batches,
        max_epochs=epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulated,
        callbacks=callbacks,
        current_epoch=2,
    )


@given(
    batches=st.integers(1, 20),
    accumulation=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    epochs=st.integers(1, 6),
    max_steps=st.one_of(st.just(-1), st.integers(1, 60)),
)
def test_progress_is_that_of_a_loop_that_steps_at_the_end_of_an_epoch(batches, accumulation, epochs, max_steps):
    starts = []  # the epoch of each step, by counting
    for epoch in range(epochs):
        accumulated = accumulation[min(epoch, len(accumulation) - 1)]
        steps = [0 for batch in range(batches) if (batch + 1) % accumulated == 0 or batch == batches - 1]
        starts += [epoch + step / len(steps) for step in range(len(steps))]
    total = len(starts) if max_steps == -1 else min(max_steps, len(starts))
    trainer = trainer_with(batches, epochs, max_steps, 99, dict(enumerate(accumulation)))
    for step in range(total):
        progress = progress_of(trainer, step)
        assert progress.epoch == pytest.approx(starts[step])
        assert progress.steps == total
    assert progress_of(trainer, total).epoch == pytest.approx(progress.epochs)
    if total == len(starts):
        assert progress.epochs == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("batches", "epochs", "max_steps", "steps"),
    [(12, -1, -1, None), (12, -1, 7, 7), (math.inf, 3, 9, 9), (math.inf, 3, -1, None)],
)
def test_a_run_may_have_no_end_and_data_no_length(batches, epochs, max_steps, steps):
    progress = progress_of(trainer_with(batches, epochs, max_steps, accumulated=5), 3)
    assert (progress.step, progress.steps, progress.epoch) == (3, steps, 2.0 if batches == math.inf else 1.0)


class Weights(Callback):
    """Notes the weights of the terms at every batch, with the optimizer steps before it."""

    def __init__(self):
        self.by_step = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name in ("until", "after"):
            weight = float(trainer.callback_metrics[f"train/{name}_weight"])
            self.by_step.setdefault(name, {})[self.step] = weight


def test_a_schedule_in_epochs_changes_at_the_end_of_an_epoch_of_partly_accumulated_batches(tmp_path):
    module = DistillationModule(
        student=TorchModule(Plain()),
        teacher=TorchModule(Plain()),
        heads={"until": Term(KD(), Until(2.0, epochs=2)), "after": Term(KD(), After(1.0, epochs=1))},
        **SETTINGS,
    )
    weights = Weights()
    fit(
        module,
        tmp_path,
        max_steps=-1,
        max_epochs=3,
        limit_train_batches=12,
        accumulate_grad_batches=5,
        log_every_n_steps=1,
        callbacks=[weights],
    )
    assert weights.by_step["until"] == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 0, 7: 0, 8: 0}
    assert weights.by_step["after"] == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}


@pytest.mark.parametrize("batches", [2, 3, 4])
def test_every_step_follows_the_mean_over_its_batches(batches, tmp_path):
    torch.manual_seed(0)
    optimizer = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    module = ClassificationModule(TorchModule(Plain()), **{**SETTINGS, **optimizer}).double()
    reference = ClassificationModule(TorchModule(Plain()), **{**SETTINGS, **optimizer}).double()
    reference.load_state_dict(module.state_dict())
    loader = Digits(batch_size=8).train_dataloader()
    loader.sampler.set_epoch(0)
    taken = [batch for batch, _ in zip(loader, range(batches), strict=False)]
    for group in (taken[:3], taken[3:]):
        if group:
            (gradients) = torch.autograd.grad(
                sum(reference.training_step(batch, 0) for batch in group) / len(group), list(reference.parameters())
            )
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter.data -= 0.1 * gradient
    fit(
        module,
        tmp_path,
        max_steps=-1,
        max_epochs=1,
        limit_train_batches=batches,
        accumulate_grad_batches=3,
        precision="64-true",
    )
    for actual, expected in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Endless(IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter([Digits(augment=False).samples("train")[0]] * 12)


def endless_fit(module, folder, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, DataLoader(Endless(), batch_size=4))
    return trainer


def test_data_without_a_length_train_and_count_their_steps(tmp_path):
    module = ClassificationModule(TorchModule(Plain()), **SETTINGS)
    assert endless_fit(module, tmp_path, max_epochs=2, accumulate_grad_batches=2).global_step == 4


def test_schedules_in_epochs_move_with_the_epochs_of_data_without_a_length_and_the_run_says_how(tmp_path):
    module = DistillationModule(
        student=TorchModule(Plain()),
        teacher=TorchModule(Plain()),
        heads={"until": Term(KD(), Until(2.0, epochs=2)), "after": Term(KD(), After(1.0, epochs=1))},
        scheduler=Warmup(epochs=2),
        **SETTINGS,
    )
    weights = Weights()
    with pytest.warns(
        UserWarning, match="no length, so that schedules in epochs change only from one epoch to the next"
    ):
        endless_fit(module, tmp_path, max_epochs=3, log_every_n_steps=1, callbacks=[weights])
    assert weights.by_step["until"] == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 0, 7: 0, 8: 0}
    assert weights.by_step["after"] == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs is 0"),
        ({"max_steps": 0}, "trainer.max_steps is 0"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches is 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be a whole number of at least 1, given 0"),
        ({"accumulate_grad_batches": -2}, "trainer.accumulate_grad_batches must be a whole number"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val must be a finite number above 0 or null, given -1.0"),
        ({"gradient_clip_val": math.nan}, "trainer.gradient_clip_val must be"),
        ({"gradient_clip_val": math.inf}, "trainer.gradient_clip_val must be"),
    ],
)  # fmt: skip
def test_a_trainer_without_a_step_or_with_meaningless_numbers_is_refused(options, message, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **options)
    with pytest.raises(UserError, match=message):
        require_trainable(trainer)
    with pytest.raises(UserError, match=message):
        trainer.fit(ClassificationModule(TorchModule(Plain()), **SETTINGS), Digits(batch_size=8))
