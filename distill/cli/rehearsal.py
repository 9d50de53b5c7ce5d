"""Rehearsal of a training for `distill check`: the set-up of `distill fit`, and a step of every head."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distill.cli.monitors import refuse_unknown_monitors
from distill.errors import UserError, under
from distill.features import Features
from distill.heads import Head
from distill.networks.modes import eval_mode
from distill.objective import key_of
from distill.schedules import Schedule
from distill.store import StoredFeatures
from distill.training.batches import dummy_batch
from distill.training.checks import require_batch_statistics
from distill.training.classification import ClassificationModule
from distill.training.lightning_internals import set_up_fit
from distill.training.run_info import run_info
from distill.training.stored import dummy_rows

_MOST_IMAGES = 64  # of a batch of dummy images; the networks see two of them
_MOST_STEPS = 10_000  # of a rehearsed scheduler


class BeforeFirstStep(Callback):
    """Refuses what would fail only after steps or epochs: an unknown metric to monitor, or a scheduler."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the monitors and the scheduler."""
        refuse_unknown_monitors(trainer, pl_module)
        if isinstance(pl_module, ClassificationModule):
            rehearse_scheduler(trainer, pl_module)


def rehearse_fit(trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
    """Do all that `distill fit` does before its first step, and a step of every head, without writing anything.

    Args:
        trainer: the trainer, not yet used.
        module: the module to train.
        data: its data.

    Raises:
        UserError: `distill fit` would refuse the set-up, or a head fails.
    """
    set_up_fit(trainer, module, data)
    BeforeFirstStep().on_fit_start(trainer, module)
    if isinstance(module, ClassificationModule):
        run = run_info(trainer)
        require_batch_statistics(module.student, run)
        module.distiller.objective.prepare(run)
        rehearse_heads(module, run.batch_size)


def rehearse_heads(module: ClassificationModule, batch_size: int | None) -> None:
    """Compute every head and its gradient on the features of two dummy images.

    A head that needs more than two images gets them repeated up to the batch size. Copies of the heads are used, so
    that no memory changes.

    Args:
        module: the module with the networks and the heads.
        batch_size: images of a batch, if known.

    Raises:
        UserError: a head returns no scalar.
    """
    if not module.terms:
        return
    image = module.student.dummy_images()
    with _unchanged(module):
        student, teachers = module.extract_features({"image": image, **dummy_rows(module.distiller, len(image))})
        for name, term in module.terms.items():
            of = module.distiller.objective.teacher_of(name)
            teacher = None if of is None else _read(name, teachers[of])
            key = f"{key_of(name)}.head"
            with under(key), torch.enable_grad():
                try:
                    _step(term.head, student, teacher, image, module)
                except Exception:
                    if (batch_size or 2) <= 2:
                        raise
                    copies = min(batch_size or 2, _MOST_IMAGES) // 2
                    repeated = student.apply(_repeat(copies)), teacher and teacher.apply(_repeat(copies))
                    _step(term.head, *repeated, image.repeat(copies, 1, 1, 1), module)


def _read(term: str, teacher: Features) -> Features:
    """Return what a term reads of a teacher: its features, or if it is stored the term's summary."""
    return teacher.summaries[term] if isinstance(teacher, StoredFeatures) else teacher


def rehearse_scheduler(trainer: Trainer, module: ClassificationModule) -> None:
    """Run the learning-rate scheduler over the length of the run, on an optimizer of its own.

    Raises:
        UserError: the learning rate becomes NaN, infinite or negative.
    """
    make: Any = module.scheduler
    if make is None or isinstance(make, Schedule):  # a schedule is computed from the length of the run
        return
    try:
        optimizer = module.optimizer(_dummy_groups(len(trainer.optimizers[0].param_groups)))
        scheduler: Any = make(optimizer)
    except Exception:  # it takes real parameters alone
        return
    with under("model.scheduler"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, _scheduler_steps(trainer) + 1):
            scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
            for rate in (float(group["lr"]) for group in optimizer.param_groups):
                if not 0 <= rate < float("inf"):
                    name = type(scheduler).__name__
                    raise UserError(f"{name} would make the learning rate {rate:g} after {step} of its steps")


def _dummy_groups(count: int) -> list[Any]:
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(count)]
    return weights if count == 1 else [{"params": [weight]} for weight in weights]


def _scheduler_steps(trainer: Trainer) -> int:
    """Return how often a run steps its scheduler."""
    if trainer.lr_scheduler_configs[0].interval == "step":
        return int(min(trainer.estimated_stepping_batches, _MOST_STEPS))
    epochs = trainer.max_epochs
    return min(epochs, _MOST_STEPS) if epochs is not None and epochs > 0 else 1


def _step(head: Head, student: Features, teacher: Features | None, image: Tensor, module: ClassificationModule) -> None:
    """Compute a copy of a head and its gradient."""
    head = deepcopy(head)
    student = student.apply(lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()))
    loss = head(student, teacher if head.needs_teacher else None, dummy_batch(image, head, module.num_classes))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"{type(head).__name__} must return a scalar, but returned {what}")
    if loss.requires_grad:
        loss.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types there


def _repeat(copies: int) -> Any:
    return lambda tensor: tensor.repeat(copies, *[1] * (tensor.ndim - 1))


@contextmanager
def _unchanged(module: ClassificationModule) -> Iterator[None]:
    """Context in which the student is in eval mode, and after which the random numbers go on as before it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(module.student):
        yield
