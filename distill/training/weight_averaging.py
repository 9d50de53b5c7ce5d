"""Averages of weights (EMA, SWA) by Lightning's `WeightAveraging`: their content, and the choice to evaluate them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from distill.errors import UserError
from distill.networks import FrozenTeacher
from distill.training import lightning_internals as internals

WeightsChoice = Literal["averaged", "current"]
"""The averaged weights of a run with a weight average, or those that it trains."""
CURRENT = "current_model_state"
"""Key under which `WeightAveraging` saves the current weights; `state_dict` then holds the averaged ones."""


class WeightsAverage(AveragedModel):
    """An average of parameters and, unless `use_buffers` is false, of BatchNorm statistics.

    Torch's own also averages all other buffers. Here they do not change: memories, counters, centers and factors are
    copied from the current module by `copy_memories` when they are needed, since copying them at every step would be
    slow. So is everything before the first update, so that an average that has not begun has the current weights.
    """

    _updates: int | None = None  # `n_averaged` on the host, so that no step waits for a device

    @classmethod
    def of(cls, average: AveragedModel) -> WeightsAverage:
        """Return an average with the module and settings of another one."""
        new = cls(nn.Module(), average.n_averaged.device, average.avg_fn, average.multi_avg_fn, average.use_buffers)
        new.module = average.module
        return new

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the current weights."""
        current = _averaged(model, self.use_buffers)
        averaged = _averaged(self.module, self.use_buffers).items()
        pairs = [(mean.detach(), current[name].detach().to(mean.device)) for name, mean in averaged]
        if not self.has_begun:
            for mean, tensor in pairs:
                mean.copy_(tensor)
        elif self.multi_avg_fn is not None:
            for kind in {(mean.device, mean.dtype) for mean, _ in pairs}:  # as the functions of torch require
                means, tensors = zip(*(pair for pair in pairs if (pair[0].device, pair[0].dtype) == kind), strict=True)
                self.multi_avg_fn(list(means), list(tensors), self.n_averaged.to(kind[0]))
        else:
            average = self.avg_fn or get_swa_avg_fn()  # type: ignore[no-untyped-call]  # torch's
            for mean, tensor in pairs:
                mean.copy_(average(mean, tensor, self.n_averaged.to(mean.device)))
        self.n_averaged += 1
        self._updates = (self._updates or 0) + 1

    @property
    def has_begun(self) -> bool:
        """True after the first update."""
        if self._updates is None:
            self._updates = int(self.n_averaged)
        return self._updates > 0

    @torch.no_grad()
    def copy_memories(self, model: nn.Module) -> None:
        """Copy all buffers that are not averaged from the current module, and the averaged ones before they are."""
        averaged = _averaged(self.module, self.use_buffers) if self.has_begun else {}
        current = _tensors(model)
        for name, tensor in _tensors(self.module).items():
            if name not in averaged and not (self.has_begun and isinstance(tensor, nn.Parameter)):
                tensor.copy_(current[name])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._updates = None


class WholeAverages(Callback):
    """Keeps memories out of the averages of `WeightAveraging` callbacks, and lets validation take the other weights.

    `ClassificationModule` adds this callback after the user's.

    Args:
        evaluated: weights that a validation during training takes.
    """

    def __init__(self, evaluated: WeightsChoice = "averaged") -> None:
        self.evaluated = evaluated
        self._callbacks: list[WeightAveraging] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the averages that the callbacks have just created, and say which weights a validation takes."""
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        found = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
        if stage != "fit":  # that of an earlier fit would restore the current weights from a checkpoint
            for callback in found:
                internals.set_weights_average(callback, None)
        self._callbacks = found if stage == "fit" else []
        for callback in self._callbacks:
            average = internals.weights_average(callback)
            if type(average) is AveragedModel:
                internals.set_weights_average(callback, WeightsAverage.of(average))
                _share_teachers(pl_module, average.module)
        if self._callbacks:
            rank_zero_info(f"validation: {_announcement(self.evaluated, 'model.evaluation_weights')}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the memories, such as statistics that are not averaged, before the averages are swapped in."""
        self._copy_memories(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap back the current weights if they are to be evaluated."""
        self._swap_back(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo `on_validation_epoch_start`."""
        self._swap_back(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the memories, since the averages replace the module at the end of training."""
        self._copy_memories(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the current memories beside the averaged weights."""
        averages = [internals.weights_average(callback) for callback in self._callbacks]
        averaged = {
            name
            for average in averages
            if isinstance(average, WeightsAverage) and average.has_begun
            for name in _averaged(average.module, average.use_buffers)
        }
        current = checkpoint.get(CURRENT, {})
        checkpoint["state_dict"] |= {name: tensor for name, tensor in current.items() if name not in averaged}

    def _copy_memories(self, module: LightningModule) -> None:
        for callback in self._callbacks:
            if isinstance(average := internals.weights_average(callback), WeightsAverage):
                average.copy_memories(module)

    def _swap_back(self, module: LightningModule) -> None:
        if self.evaluated == "current":
            for callback in self._callbacks:
                internals.swap_weights(callback, module)


def _share_teachers(module: nn.Module, copied: nn.Module) -> None:
    """Let a copy of a module have the module's own teachers, which are large and never change."""
    for original, twin in zip(module.modules(), copied.modules(), strict=True):
        if isinstance(original, FrozenTeacher) and isinstance(twin, FrozenTeacher):
            twin.share(original)


def evaluated_weights(checkpoint: Mapping[str, Any], choice: WeightsChoice | None, option: str) -> dict[str, Tensor]:
    """Return the weights of a checkpoint to evaluate or to export, and say which they are if it has two kinds.

    Args:
        checkpoint: the content of a checkpoint.
        choice: the weights to take; by default, the averaged ones if there are any.
        option: the option that makes the choice, for messages.

    Raises:
        UserError: averaged weights are required, but there are none.
    """
    if CURRENT not in checkpoint:
        if choice == "averaged":
            raise UserError(f"{option} is averaged, but the checkpoint is of a run without a weight average")
        return dict(checkpoint["state_dict"])
    choice = choice or "averaged"
    rank_zero_info(f"ckpt_path: {_announcement(choice, option)}")
    return dict(checkpoint["state_dict" if choice == "averaged" else CURRENT])


def _announcement(choice: WeightsChoice, option: str) -> str:
    alternative = "current" if choice == "averaged" else "averaged"
    return f"the {choice} weights are taken; {option}={alternative} takes the {alternative} ones"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _averaged(module: nn.Module, with_statistics: bool) -> dict[str, Tensor]:
    """Return the tensors that are averaged, by name."""
    statistics = {
        name: buffer
        for name, buffer in module.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var") and buffer.is_floating_point()
    }
    return dict(module.named_parameters()) | (statistics if with_statistics else {})
