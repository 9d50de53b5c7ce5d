"""Scaling of the learning rate to the effective batch."""

import re

import pytest
import torch
from torch import nn

from distill.errors import UserError
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
