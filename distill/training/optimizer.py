"""Parameter groups for weight decay, and learning rates scaled to the effective batch."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from distill.errors import UserError

WeightDecayOn = Literal["all", "matrices"]
"""Parameters with weight decay: all, or those of more than one dimension."""
LRScaling = Literal["none", "linear", "sqrt"]
"""Scaling of the learning rate with the effective batch or with its square root."""


@dataclass(frozen=True)
class EffectiveBatch:
    """Number of images per optimizer step.

    Args:
        images: images per batch and device.
        devices: number of devices over all ranks.
        accumulated: number of batches accumulated per step.
    """

    images: int
    devices: int = 1
    accumulated: int = 1

    @property
    def total(self) -> int:
        """Number of images per step: the product of the three."""
        return self.images * self.devices * self.accumulated

    def __str__(self) -> str:
        return f"{self.total} = {self.images} images x {self.devices} devices x {self.accumulated} accumulated"


def parameter_groups(
    module: nn.Module, weight_decay_on: WeightDecayOn, exempt: AbstractSet[str] = frozenset()
) -> list[Any]:
    """Return a module's trainable parameters, in two groups if some are exempt from weight decay.

    Args:
        module: the module with the parameters.
        weight_decay_on: parameters with weight decay.
        exempt: for `matrices`, names of further parameters without weight decay.

    Returns:
        The parameters themselves for `all`; for `matrices`, a group with weight decay and one without.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if weight_decay_on == "all":
        return list(trainable.values())
    without_decay = {name for name, parameter in trainable.items() if parameter.ndim <= 1 or name in exempt}
    return [
        {"params": [parameter for name, parameter in trainable.items() if name not in without_decay]},
        {"params": [trainable[name] for name in trainable if name in without_decay], "weight_decay": 0.0},
    ]


def require_valid_settings(optimizer: Optimizer) -> None:
    """Check the numbers of a new optimizer, of which torch lets NaN and infinity pass.

    Raises:
        UserError: a setting is not finite, or a learning rate or weight decay is negative.
    """
    for group in optimizer.param_groups:
        for name, value in group.items():
            numbers = value if isinstance(value, tuple | list) else [value]
            if name == "params" or not all(isinstance(number, int | float) for number in numbers):
                continue
            least = 0.0 if name in ("lr", "weight_decay") else -inf
            if not all(isfinite(number) and number >= least for number in numbers):
                rule = "finite and not negative" if least == 0 else "finite"
                raise UserError(f"model.optimizer: {name} must be {rule}, given {value}")


def scale_learning_rate(optimizer: Optimizer, rule: LRScaling, batch: EffectiveBatch | None, reference: int) -> str:
    """Scale the learning rates of all parameter groups to the effective batch.

    Args:
        optimizer: a new optimizer without a scheduler.
        rule: the factor: `linear` is batch / reference, `sqrt` its square root, `none` 1.
        batch: the effective batch; `None` for no scaling.
        reference: the effective batch that the learning rate was chosen for.

    Returns:
        A description of the scaling.
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
