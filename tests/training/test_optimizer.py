"""Scaling of the learning rate to the effective batch."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.schedules import Linear
from distill.training.lr_schedulers import TimmScheduler
from distill.training.optimizer import EffectiveBatch, scale_learning_rate
from tests.training.test_modules import distillation, fit


def optimizer(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_an_effective_batch_is_the_product():
    batch = EffectiveBatch(images=64, devices=8, accumulated=2)
    assert batch.total == 1024
    assert str(batch) == "1024 = 64 images x 8 devices x 2 accumulated"


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_the_learning_rate_of_every_group_is_scaled(rule, factor):
    scaled = optimizer(0.1, 0.3)
    scale_learning_rate(scaled, rule, EffectiveBatch(128, 8), 256)
    assert [group["lr"] for group in scaled.param_groups] == pytest.approx([0.1 * factor, 0.3 * factor])


def test_the_scaling_is_described():
    description = scale_learning_rate(optimizer(0.001), "linear", EffectiveBatch(128, 8), 256)
    assert description == (
        "0.004 = 0.001 x 4 (linear, effective batch 1024 = 128 images x 8 devices x 1 accumulated, reference 256)"
    )
    assert scale_learning_rate(optimizer(0.001), "none", EffectiveBatch(128), 256) == "0.001, not scaled"


def test_fit_begins_with_the_scaled_learning_rate_including_accumulation(tmp_path):
    module = distillation(lr_scaling="sqrt", lr_base_size=4)
    trainer = fit(module, tmp_path, max_steps=1, accumulate_grad_batches=2)  # 8 images twice
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 2)


def test_a_base_size_below_1_is_rejected():
    with pytest.raises(UserError, match=re.escape("lr_base_size must be at least 1, given 0")):
        distillation(lr_base_size=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": math.nan}, "model.optimizer: lr must be finite and not negative, given nan"),
        ({"lr": math.inf}, "model.optimizer: lr must be finite and not negative, given inf"),
        ({"lr": 0.1, "weight_decay": math.nan}, "model.optimizer: weight_decay must be finite and not negative"),
        ({"lr": 0.1, "momentum": math.nan}, "model.optimizer: momentum must be finite, given nan"),
    ],
)
def test_settings_that_are_not_finite_are_refused(settings, message):
    module = distillation(optimizer=partial(torch.optim.SGD, **settings))
    with pytest.raises(UserError, match=re.escape(message)):
        module.make_optimizer(None)


def test_a_schedule_of_negative_learning_rates_is_refused():
    with pytest.raises(UserError, match="scheduler: a learning rate cannot be negative, but the factor reaches -1"):
        distillation(scheduler=Linear(1.0, -1.0))


def test_a_schedule_that_counts_epochs_does_not_count_steps(tmp_path):
    module = distillation(scheduler=partial(TimmScheduler, num_epochs=3), scheduler_interval="step")
    with pytest.raises(UserError, match="model.scheduler_interval is 'step', but TimmScheduler counts epochs"):
        fit(module, tmp_path)


@pytest.mark.parametrize("settings", [{"num_epochs": 0}, {"warmup_lr": math.nan}, {"min_lr": -1.0}, {"decay_rate": -1}])
def test_numbers_of_timms_schedules_are_checked(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} must be"):
        TimmScheduler(optimizer(0.1), **settings)
