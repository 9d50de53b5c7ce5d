"""Training from a checkpoint has the configuration's settings and the checkpoint's state, from the first step on."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from distill.errors import UserError
from distill.networks.torch_module import TorchModule
from distill.schedules import Cosine, Warmup
from distill.training.classification import ClassificationModule
from distill.training.continuation import Continuation
from distill.training.lr_schedulers import TimmScheduler
from tests.nets import Plain
from tests.training.test_modules import SETTINGS, fit

DONE, LEFT = 7, 8  # steps before and after the checkpoint


def _sequential(optimizer):
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 3), CosineAnnealingLR(optimizer, 12)], [3])


SCHEDULERS = {
    "none": None,
    "LambdaLR": partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "MultiplicativeLR": partial(MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": partial(StepLR, step_size=3),
    "MultiStepLR": partial(MultiStepLR, milestones=[4, 9], gamma=0.3),
    "ExponentialLR": partial(ExponentialLR, gamma=0.8),
    "PolynomialLR": partial(PolynomialLR, total_iters=12),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=15, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": partial(CosineAnnealingWarmRestarts, T_0=4),
    "CyclicLR": partial(CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3),
    "OneCycleLR": partial(OneCycleLR, max_lr=0.4, total_steps=20),
    "SequentialLR": _sequential,
    "ChainedScheduler": lambda optimizer: ChainedScheduler([ExponentialLR(optimizer, 0.9), LinearLR(optimizer, 0.5)]),
    "TimmScheduler": partial(TimmScheduler, num_epochs=15, warmup_epochs=3, warmup_lr=1e-3),
}


class Training:
    """A plain loop that saves and loads as Lightning does."""

    def __init__(self, make, make_scheduler, checkpoint=None):
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.optimizer = make([self.weight])
        self.scheduler = None if make_scheduler is None else make_scheduler(self.optimizer)
        continuation = Continuation()
        if checkpoint is not None:
            checkpoint = deepcopy(checkpoint)
            continuation.load(checkpoint, SimpleNamespace(callbacks=[]))
        config = None if self.scheduler is None else {"scheduler": self.scheduler, "interval": "step"}
        continuation.configure(self.optimizer, config, make_scheduler, make)
        self.settings = continuation.settings
        if checkpoint is not None:
            self.weight.data.copy_(checkpoint["weight"])
            self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
            for state in checkpoint["lr_schedulers"]:
                self.scheduler.load_state_dict(state)
        self.position = 0 if checkpoint is None else checkpoint["global_step"]

    def run(self, steps, metric=1.0):
        """Return the settings of each step that a scheduler may move."""
        moved = []
        for _ in range(steps):
            group = self.optimizer.param_groups[0]
            moved.append((group["lr"], group.get("momentum"), group.get("betas")))
            self.weight.grad = torch.full_like(self.weight, 0.1)
            self.optimizer.step()
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(metric)
            elif self.scheduler is not None:
                self.scheduler.step()
            self.position += 1
        return moved

    def save(self):
        return deepcopy(
            {
                "weight": self.weight.data,
                "optimizer_states": [self.optimizer.state_dict()],
                "lr_schedulers": [] if self.scheduler is None else [self.scheduler.state_dict()],
                "global_step": self.position,
                "distill": {"optimizer": self.settings},
            }
        )


def saved(make, make_scheduler):
    training = Training(make, make_scheduler)
    training.run(DONE)
    return training.save()


BEFORE = partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
AFTER = partial(SGD, lr=0.03, momentum=0.5, weight_decay=5e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_with_the_new_rates_at_its_position(name):
    scheduler = SCHEDULERS[name]
    expected = Training(AFTER, scheduler).run(DONE + LEFT)[DONE:]
    continued = Training(AFTER, scheduler, saved(BEFORE, scheduler))
    assert continued.run(LEFT) == expected


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_the_same_settings_every_bit_stays(name):
    scheduler = SCHEDULERS[name]
    undisturbed = Training(BEFORE, scheduler)
    undisturbed.run(DONE)
    checkpoint = undisturbed.save()
    moved = undisturbed.run(LEFT)
    continued = Training(BEFORE, scheduler, checkpoint)
    assert json.loads(continued.settings["settings"]) == json.loads(checkpoint["distill"]["optimizer"]["settings"])
    assert continued.run(LEFT) == moved
    assert torch.equal(continued.weight, undisturbed.weight)
    state, expected = (training.optimizer.state_dict()["state"] for training in (continued, undisturbed))
    assert torch.equal(state[0]["momentum_buffer"], expected[0]["momentum_buffer"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (partial(CosineAnnealingLR, T_max=15), partial(CosineAnnealingLR, T_max=40)),
        (partial(MultiStepLR, milestones=[4]), partial(MultiStepLR, milestones=[6, 9])),
        (partial(StepLR, step_size=3), partial(OneCycleLR, max_lr=0.4, total_steps=20)),
        (partial(StepLR, step_size=3), None),
        (None, partial(StepLR, step_size=3)),
        (partial(TimmScheduler, num_epochs=15), partial(TimmScheduler, num_epochs=30)),
    ],
)
def test_the_settings_of_the_scheduler_are_the_new_ones_too(before, after):
    expected = Training(BEFORE, after).run(DONE + LEFT)[DONE:]
    assert Training(BEFORE, after, saved(BEFORE, before)).run(LEFT) == expected


def test_the_optimizers_state_and_counters_are_kept():
    checkpoint = saved(partial(AdamW, lr=0.1, betas=(0.9, 0.99)), None)
    continued = Training(partial(AdamW, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3, eps=1e-3), None, checkpoint)
    (group,) = continued.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.01, (0.8, 0.9), 0.3, 1e-3)
    for name, value in checkpoint["optimizer_states"][0]["state"][0].items():
        assert torch.equal(continued.optimizer.state_dict()["state"][0][name], value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (partial(Adam, lr=0.1), partial(Adam, lr=0.1, amsgrad=True)),
        (partial(RMSprop, lr=0.1), partial(RMSprop, lr=0.1, momentum=0.9, centered=True)),
        (partial(SGD, lr=0.1), partial(SGD, lr=0.1, momentum=0.9)),
    ],
)
def test_settings_that_need_further_state_begin_with_zeros(before, after):
    continued = Training(after, None, saved(before, None))
    continued.run(LEFT)
    assert continued.weight.isfinite().all()


class Counting(SGD):
    """An optimizer that keeps a counter in its groups, as some of timm's do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.defaults["taken"] = 0
        for group in self.param_groups:
            group["taken"] = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            group["late"] = group.get("late", 0) + 1
        return super().step(closure)


def test_counters_in_the_groups_are_state_and_no_settings():
    continued = Training(partial(Counting, lr=0.5), None, saved(partial(Counting, lr=0.1), None))
    (group,) = continued.optimizer.param_groups
    assert (group["lr"], group["taken"], group["late"]) == (0.5, DONE, DONE)


def test_a_plateau_scheduler_keeps_its_reductions_and_its_best_value():
    before = Training(BEFORE, partial(ReduceLROnPlateau, factor=0.5, patience=1))
    before.run(6)  # the metric never falls: two reductions, and one bad epoch
    assert before.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    after = partial(ReduceLROnPlateau, factor=0.1, patience=3)
    continued = Training(AFTER, after, before.save())
    rates = [lr for lr, *_ in continued.run(5)]
    assert rates[:3] == pytest.approx([0.03 / 4] * 3)
    assert rates[-1] == pytest.approx(0.03 / 40)
    assert continued.scheduler.best == 1.0
    first = Training(AFTER, partial(ReduceLROnPlateau, mode="max"), before.save())
    assert first.scheduler.best == -torch.inf


@pytest.mark.parametrize(
    ("make", "make_scheduler", "message"),
    [
        (partial(AdamW, lr=0.1), None, "the checkpoint was trained with torch.*SGD, given torch.*AdamW"),
        (lambda p: SGD([{"params": p}, {"params": nn.Parameter(torch.ones(1))}]), None, "groups have 1 .* 1 and 1"),
        (BEFORE, partial(OneCycleLR, max_lr=1, total_steps=5), "model.scheduler: OneCycleLR cannot continue after 7"),
    ],
    ids=["another optimizer", "more groups", "a scheduler that is over"],
)
def test_what_cannot_continue_is_refused_in_one_sentence(make, make_scheduler, message):
    with pytest.raises(UserError, match=message):
        Training(make, make_scheduler, saved(BEFORE, None))


def test_a_checkpoint_of_weights_only_is_refused():
    with pytest.raises(UserError, match="only weights"):
        Training(BEFORE, None, {"global_step": 3, "distill": {}})


class Rates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.rates, self.moments = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.moments.append([state["momentum_buffer"].clone() for state in optimizer.state.values()])


def train(folder, ckpt_path=None, lr=0.1, steps=6, callbacks=(), **settings):
    torch.manual_seed(0)
    optimizer = {"optimizer": partial(SGD, lr=lr, momentum=0.9)}
    module = ClassificationModule(TorchModule(Plain()), **{**SETTINGS, **optimizer, **settings})
    rates = Rates()
    trainer = fit(
        module, folder, ckpt_path, max_steps=steps, limit_train_batches=4, callbacks=[rates, *callbacks], max_epochs=-1
    )
    return rates, trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scheduler": Warmup(Cosine(1.0, 0.0, steps=40), steps=10)},
        {"scheduler": partial(StepLR, step_size=1, gamma=0.5)},
        {"scheduler": partial(TimmScheduler, num_epochs=5), "weight_decay_on": "matrices"},
    ],
)
def test_a_run_from_a_checkpoint_has_the_new_rate_at_its_first_step(settings, tmp_path):
    _, trainer = train(tmp_path, **settings)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved_moments = torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"][0]["state"].values()
    continued, _ = train(tmp_path, tmp_path / "a.ckpt", lr=0.02, steps=10, **settings)
    expected, _ = train(tmp_path, lr=0.02, steps=10, **settings)
    assert continued.rates == expected.rates[6:]
    assert all(
        torch.equal(moment, state["momentum_buffer"])
        for moment, state in zip(continued.moments[0], saved_moments, strict=True)
    )


def test_a_changed_schedule_of_this_project_holds_from_the_first_step(tmp_path):
    _, trainer = train(tmp_path, scheduler=Cosine(1.0, 0.0, steps=40))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    continued, _ = train(tmp_path, tmp_path / "a.ckpt", steps=8, scheduler=Warmup(1.0, steps=12))
    assert continued.rates == pytest.approx([0.1 * 6 / 12, 0.1 * 7 / 12])


def test_the_patience_of_early_stopping_is_the_configurations(tmp_path):
    _, trainer = train(tmp_path, callbacks=[EarlyStopping("train/loss", patience=2, check_on_train_epoch_end=True)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stopping = EarlyStopping("train/loss", patience=9, check_on_train_epoch_end=True)
    train(tmp_path, tmp_path / "a.ckpt", steps=8, callbacks=[stopping])
    assert stopping.patience == 9
