"""Base of the callbacks that measure the gradients of the terms in some of the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distill.errors import UserError, one_of
from distill.features import Features
from distill.gradients import Measurement, TermGradients, allow_retained_graphs, require_terms, shared_parameters
from distill.objective import Losses, Objective
from distill.training.classification import ClassificationModule

At = Literal["parameters", "embedding", "tokens"]
"""Where gradients are compared: at the student's parameters below its classifier, at its embedding or its tokens."""

FILLED = 0.9
"""Filled share from which a memory counts as filled; an epoch may leave a remainder of the samples out."""


class GradientMeter(Callback, ABC):
    """Measures the gradients of all terms in the steps that a subclass chooses.

    They come from the graph of the step, one backward pass per term, so that neither memories nor random states nor
    DDP notice. The gradient is that of the optimizer step: of all accumulated batches and of all ranks. A term whose
    head has a memory is measured once that is filled. Under a `GradScaler`, gradients are unscaled, and a term that
    overflows is left out of the measurement.

    Args:
        at: where the gradients are compared.

    Attributes:
        unfilled: the terms that the current or last measurement leaves out until their memories are filled.
    """

    def __init__(self, at: At = "parameters") -> None:
        one_of("at", at, ("parameters", "embedding", "tokens"))
        self.at: At = at
        self._hook: RemovableHandle | None = None
        self._step: tuple[Features, Losses] | None = None  # of the current batch
        self._gradients: TermGradients | None = None  # of the current optimizer step, if it is measured
        self.unfilled: Collection[str] = ()
        self._warned: set[str] = set()

    @abstractmethod
    def is_measured(self, trainer: Trainer, objective: Objective) -> bool:
        """Return True if the optimizer step that begins is measured; the same on all ranks."""

    @abstractmethod
    def on_measured(self, trainer: Trainer, objective: Objective, measurement: Measurement) -> None:
        """Use the measurement of a step, just before the optimizer's step; the same on all ranks."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to measure, before step 0."""
        module = _classification(pl_module)
        try:
            require_terms(list(module.terms))
            shared_parameters(module.student)
            if self.at != "parameters":
                module.student.spec[self.at]  # raises if there is none
        except UserError as error:
            raise self.error(str(error)) from None
        allow_retained_graphs()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register a hook that notes the features and losses of measured steps."""
        objective = _classification(pl_module).distiller.objective
        self._hook = objective.register_forward_hook(self._note, with_kwargs=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a measurement with the first batch of a step."""
        objective = _classification(pl_module).distiller.objective
        if self._gradients is None and self.is_measured(trainer, objective):
            self._gradients = TermGradients()
            self.unfilled = [name for name, share in filled_memories(objective).items() if share < FILLED]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the gradients of a batch, whose graph is complete now."""
        if self._gradients is None or self._step is None:
            return
        (student, losses), self._step = self._step, None
        at = shared_parameters(_classification(pl_module).student) if self.at == "parameters" else [student[self.at]]
        scaler = _scaler(trainer)
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=losses.total.device))
        self._gradients.add(losses, at, scale, self.unfilled)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """End the measurement of a step."""
        if self._gradients is None:
            return
        measurement, self._gradients = self._gradients.measure(), None
        if not measurement.values:  # all terms have weight 0
            return
        if broken := measurement.not_finite():
            if _scaler(trainer) is None:
                raise UserError(
                    f"the gradient of the term {' and '.join(map(repr, broken))} is not finite at step "
                    f"{trainer.global_step}; the last checkpoint is intact, try a smaller learning rate or weight"
                )
            measurement = measurement.without(broken)
            self.warn_once("overflow", f"the gradient of {_listed(broken)} overflowed in float16 and was left out")
        self.on_measured(trainer, _classification(pl_module).distiller.objective, measurement)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hook."""
        self._remove_hook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook."""
        self._remove_hook()

    def error(self, message: str) -> UserError:
        """Return an error that names this callback."""
        return UserError(f"trainer.callbacks: {type(self).__name__}: {message}")

    def warn_once(self, kind: str, message: str) -> None:
        """Warn of each kind of thing once."""
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(f"{type(self).__name__}: {message}")

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], losses: Losses) -> None:
        if self._gradients is not None and torch.is_grad_enabled():
            self._step = (args[0] if args else kwargs["student"]), losses

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._step = self._gradients = None


def filled_memories(objective: Objective) -> Mapping[str, float]:
    """Return the filled share of each head that has a memory, by term name; waits for the device."""
    found = {name: share for name, term in objective.terms.items() if (share := term.head.filled()) is not None}
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}


def _classification(module: LightningModule) -> ClassificationModule:
    assert isinstance(module, ClassificationModule)
    return module


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _listed(names: Collection[str]) -> str:
    return " and ".join(map(repr, names))
