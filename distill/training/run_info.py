"""Facts of a run for schedules and heads, read from the trainer."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from lightning.pytorch import Trainer

from distill.heads import RunInfo
from distill.schedules import Progress


def progress_of(trainer: Trainer, step: int) -> Progress:
    """Return the progress of training after `step` optimizer steps."""
    steps = trainer.estimated_stepping_batches
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    endless = steps == inf
    return Progress(
        step=step,
        epoch=step / steps_per_epoch,
        steps=None if endless else int(steps),
        epochs=None if endless else steps / steps_per_epoch,
    )


def run_info(trainer: Trainer) -> RunInfo:
    """Return the facts of the run that a trainer is about to begin."""
    progress = progress_of(trainer, 0)  # first: Lightning loads the training data for it
    loader: Any = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # and these
    added = {str(callback.adds_to_batch) for callback in callbacks if hasattr(callback, "adds_to_batch")}
    return RunInfo(
        progress=progress,
        batch_size=smallest_batch(loader, trainer.num_training_batches),
        world_size=trainer.world_size,
        samples=None if dataset is None else len(dataset),
        class_counts=(lambda: torch.tensor(data.class_counts())) if hasattr(data, "class_counts") else None,
        provides=RunInfo().provides | added,
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
