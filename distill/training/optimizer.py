"""What the optimizer is given: which parameters decay, and a learning rate that goes with the batch."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

WeightDecayOn = Literal["all", "matrices"]
"""What weight decay is for: all parameters, or those of more than one dimension."""
LRScaling = Literal["none", "linear", "sqrt"]
"""How a learning rate goes with the effective batch: in proportion, or with the square root of it."""


@dataclass(frozen=True)
class EffectiveBatch:
    """How many images one step of the optimizer sees.

    Args:
        images: on one device at a time.
        devices: on which all ranks train.
        accumulated: how many such batches go into one step.
    """

    images: int
    devices: int = 1
    accumulated: int = 1

    @property
    def total(self) -> int:
        """The product of the three."""
        return self.images * self.devices * self.accumulated

    def __str__(self) -> str:
        return f"{self.total} = {self.images} images x {self.devices} devices x {self.accumulated} accumulated"


def parameter_groups(
    module: nn.Module, weight_decay_on: WeightDecayOn, exempt: AbstractSet[str] = frozenset()
) -> list[Any]:
    """All that learns, in one group, or apart from what weight decay spares.

    Args:
        module: whose parameters these are.
        weight_decay_on: what weight decay is for.
        exempt: names of parameters that it spares besides those of one dimension.
    """
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if weight_decay_on == "all":
        return list(learning.values())
    spared = {name for name, parameter in learning.items() if parameter.ndim <= 1 or name in exempt}
    return [
        {"params": [parameter for name, parameter in learning.items() if name not in spared]},
        {"params": [learning[name] for name in learning if name in spared], "weight_decay": 0.0},
    ]


def scale_learning_rate(optimizer: Optimizer, rule: LRScaling, batch: EffectiveBatch | None, reference: int) -> str:
    """Multiply the learning rates of all parameter groups by what the rule makes of batch / reference.

    Args:
        optimizer: fresh, before it gets a scheduler.
        rule: `linear`: the ratio; `sqrt`: its square root; `none`: 1.
        batch: the effective batch; without it nothing is scaled.
        reference: the effective batch that the learning rate was chosen for.

    Returns:
        What was done, in words.
    """
    given = optimizer.param_groups[0]["lr"]
    if rule == "none" or batch is None:
        return f"{float(given):.6g}, not scaled"
    ratio = batch.total / reference
    factor = ratio if rule == "linear" else ratio**0.5
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    scaled = float(optimizer.param_groups[0]["lr"])
    return f"{scaled:.6g} = {float(given):.6g} x {factor:.6g} ({rule}, effective batch {batch}, reference {reference})"
