"""Facts of a run for schedules and heads, read from the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil, inf, isfinite
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it

from distill.data import ImageData
from distill.errors import UserError
from distill.heads import RunInfo
from distill.schedules import Progress, Schedule
from distill.training.batches import provided_keys


def steps_per_epoch(batches: float, accumulated: int) -> float:
    """Return the number of optimizer steps per epoch; the last step may accumulate fewer batches.

    Args:
        batches: batches per epoch, infinite for data without a length.
        accumulated: batches accumulated per step.
    """
    return batches if batches == inf else max(ceil(batches / accumulated), 1)


def progress_of(trainer: Trainer, step: int) -> Progress:
    """Return the progress of training after `step` optimizer steps.

    Of data without a length, only the whole epochs are known: those that the trainer has done.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches, accumulation = trainer.num_training_batches, _accumulation(trainer)
    epochs = inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
    steps = _steps_after(epochs, batches, accumulation)
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps)
    endless = steps == inf
    if batches == inf:
        done = float(trainer.current_epoch if step else 0)
        return Progress(step, done, steps=None if endless else int(steps))
    return Progress(
        step=step,
        epoch=_epochs_after(step, batches, accumulation),
        steps=None if endless else int(steps),
        epochs=None if endless else _epochs_after(steps, batches, accumulation),
    )


def accumulation_weight(trainer: Trainer, batch_idx: int) -> float:
    """Return the factor of a batch's loss that makes every optimizer step follow the mean over its batches.

    Lightning divides each loss by `accumulate_grad_batches`, although the last step of an epoch may accumulate fewer
    batches; its gradient would be too small. The factor corrects that, except for data without a length, whose last
    batch is not known in time.
    """
    accumulated, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if accumulated == 1 or batches == inf or trainer.strategy.handles_gradient_accumulation:
        return 1.0
    remainder = int(batches) % accumulated
    return accumulated / remainder if remainder and batch_idx >= batches - remainder else 1.0


def run_info(trainer: Trainer) -> RunInfo:
    """Return the facts of the run that a trainer is about to begin."""
    progress = progress_of(trainer, 0)  # first: it loads the training data
    module: Any = trainer.lightning_module
    numbers = [number for term in module.terms.values() for number in (term.weight, *vars(term.head).values())]
    if trainer.num_training_batches == inf and any(map(_counts_epochs, [module.scheduler, *numbers])):
        rank_zero_warn(
            "the training data have no length, so that schedules in epochs change only from one epoch to the next, "
            "and a Warmup begins with a whole epoch at its start: give their length in steps"
        )
    loader: Any = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
    return RunInfo(
        progress=progress,
        batch_size=smallest_batch(loader, trainer.num_training_batches),
        world_size=trainer.world_size,
        samples=length(dataset),
        class_counts=(lambda: torch.tensor(data.class_counts())) if hasattr(data, "class_counts") else None,
        views=len(data.train_views) if isinstance(data, ImageData) else None,
        provides=provided_keys(trainer, trainer.lightning_module, loader),
    )


def smallest_batch(loader: Any, batches: float = inf) -> int | None:
    """Return the number of images in the smallest of a loader's first `batches` batches; `None` if it is unknown.

    That is the last one of a loader that keeps a remainder (`drop_last=False`).
    """
    images: int | None = getattr(loader, "batch_size", None)
    if images is None or getattr(loader, "drop_last", True):
        return images
    try:
        samples, length = len(loader.sampler), len(loader)
    except TypeError:  # of an IterableDataset
        return images
    return images if batches < length else samples % images or images


def log_every_epoch(trainer: Trainer) -> None:
    """Log at least at the last step of each epoch, where the logging interval is longer than an epoch or the run."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's Trainer has it
    steps = [phase[2] for phase in _phases(trainer.num_training_batches, _accumulation(trainer))]
    run = progress_of(trainer, 0).steps or inf
    trainer.log_every_n_steps = int(min(every, run, *steps))  # type: ignore[attr-defined]


def length(sized: Any) -> int | None:
    """Return the length of a data set, a loader or a sampler; `None` if it has none."""
    try:
        return len(sized)
    except TypeError:  # no data set, or an IterableDataset
        return None


def require_trainable(trainer: Trainer) -> None:
    """Check the trainer's numbers that Lightning accepts though no training could follow from them.

    Raises:
        UserError: the run has no step, or a number of accumulated batches or a clipping value makes no sense.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise UserError(f"trainer.{name} is 0, so that nothing would be trained: give a number above 0")
    accumulated: Any = trainer.accumulate_grad_batches
    if accumulated < 1 or accumulated != int(accumulated):
        raise UserError(f"trainer.accumulate_grad_batches must be a whole number of at least 1, given {accumulated}")
    clip: Any = trainer.gradient_clip_val
    if clip is not None and not (isfinite(clip) and clip >= 0):
        raise UserError(f"trainer.gradient_clip_val must be a finite number above 0 or null, given {clip}")


def _accumulation(trainer: Trainer) -> Mapping[int, int]:
    """Return the number of accumulated batches by the epoch from which on it holds."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    found = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return found[0].scheduling if found else {0: trainer.accumulate_grad_batches}


def _phases(batches: float, accumulation: Mapping[int, int]) -> Iterator[tuple[float, float, float]]:
    """Yield first epoch, number of epochs and steps per epoch of each phase with the same accumulation."""
    starts = sorted(accumulation)
    for start, end in zip(starts, [*starts[1:], inf], strict=True):
        yield start, end - start, steps_per_epoch(batches, accumulation[start])


def _steps_after(epochs: float, batches: float, accumulation: Mapping[int, int]) -> float:
    phases = _phases(batches, accumulation)
    return sum(min(epochs - start, length) * per_epoch for start, length, per_epoch in phases if epochs > start)


def _epochs_after(step: float, batches: float, accumulation: Mapping[int, int]) -> float:
    epoch = 0.0
    for start, length, per_epoch in _phases(batches, accumulation):
        epoch = start + step / per_epoch
        if step <= length * per_epoch:
            break
        step -= length * per_epoch
    return epoch


def _counts_epochs(number: object) -> bool:
    """Return True for a schedule whose length, or that of one within it, is in epochs."""
    if not isinstance(number, Schedule):
        return False
    return getattr(number, "epochs", None) is not None or any(map(_counts_epochs, vars(number).values()))
