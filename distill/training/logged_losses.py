"""Figures of a training step: when they are logged, and their means over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from distill.distributed import all_mean, world_size
from distill.objective import Losses
from distill.training.lightning_internals import trainer_of


def log_losses(module: LightningModule, losses: Losses, images: int) -> None:
    """Log the loss of a step, and on the steps that are shown, its terms and the learning rate.

    Args:
        module: the module that made the step.
        losses: of the step.
        images: number of images in the batch.
    """
    loss, trainer = losses.total.detach(), trainer_of(module)
    if trainer is not None and is_logged(trainer, module.global_step + 1):
        figures = figures_of(losses) | {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        loss = figures.pop("loss")
        module.log_dict(
            {f"train/{name}": _on(loss.device, value) for name, value in figures.items()}, batch_size=images
        )
    elif world_size() > 1:
        return  # this rank's own loss is another on each rank, and so would be what depends on it
    module.log("train/loss", loss, prog_bar=True, batch_size=images)


def is_logged(trainer: Trainer, step: int) -> bool:
    """Return True if the terms of a step are logged: at the logging interval and at the end of an epoch or run.

    Logging a value takes Lightning about 0.3 ms, even on the steps whose values it discards. The answer is the same on
    all ranks, whose figures are then averaged. A plateau scheduler that steps after every batch gets figures in each.

    Args:
        trainer: the trainer.
        step: the number of the optimizer step, from 1.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's Trainer has it
    if every == 0:  # a barebones trainer logs nothing
        return False
    if trainer.is_last_batch or step == trainer.max_steps or step % every == 0:
        return True
    if world_size() == 1:
        return trainer.should_stop
    return any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs)


def figures_of(losses: Losses) -> dict[str, Any]:
    """Return the loss, the terms and their diagnostics as means over all ranks, by one reduction, and the weights."""
    figures: dict[str, Any] = {"loss": losses.total.detach()}
    for name, value in losses.values.items():
        figures[name] = value.detach()
        figures |= {f"{name}/{key}": scalar for key, scalar in losses.diagnostics[name].items()}
    if world_size() > 1:
        stacked = torch.stack([torch.as_tensor(value).to(losses.total).reshape(()) for value in figures.values()])
        figures = dict(zip(figures, all_mean(stacked).unbind(), strict=True))
    for name, weight in losses.weights.items():
        figures[f"{name}_weight"] = weight
        if name in figures:  # else its teacher did not run
            figures[f"{name}_weighted"] = weight * figures[name]
    return figures


def _on(device: torch.device, value: Tensor | float) -> Tensor:
    """Return a number as a tensor on a device, filled there: Lightning would copy it, and wait for the copy."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)
