"""Lightning's search for the largest batch that fits into memory, where a run cannot have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from distill.errors import UserError
from distill.objective import Term, key_of
from distill.training.lightning_internals import ends_with_search
from distill.training.optimizer import LRScaling

_REMEDY = "leave it out, and give data.batch_size"


def require_valid_search(trainer: Trainer, lr_scaling: LRScaling, terms: Mapping[str, Term]) -> None:
    """Check that a `BatchSizeFinder` finds what the run needs for its trials and leaves behind what it was set up with.

    The search begins when the optimizer is made, and its trials run without other callbacks.
    One that ends the run (`Tuner.scale_batch_size`) trains nothing, so that its learning rate does not matter.

    Args:
        trainer: the trainer, before its run.
        lr_scaling: how the learning rate depends on the batch size.
        terms: the terms of the loss, by name.

    Raises:
        UserError: there is such a callback, and the learning rate is scaled to the batch size before, or a term needs
            what a callback adds to the batch.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    searches = [callback for callback in callbacks if isinstance(callback, BatchSizeFinder)]
    if not searches:
        return
    name = f"trainer.callbacks: {type(searches[0]).__name__}"
    for callback in callbacks:
        added = None if getattr(callback, "in_workers", False) else getattr(callback, "adds_to_batch", None)
        for term, reader in terms.items():
            if added in reader.head.batch_needs:
                raise UserError(
                    f"{name} tries batches without the other callbacks, but {key_of(term)} needs the {added} of "
                    f"{type(callback).__name__}: {_REMEDY}"
                )
    if lr_scaling != "none" and not all(map(ends_with_search, searches)):
        raise UserError(
            f"{name} changes the batch size after model.lr_scaling, {lr_scaling!r}, has scaled the learning rate to "
            f"the one given: {_REMEDY} as found in a run with lr_scaling 'none'"
        )


def require_no_search(trainer: Trainer) -> None:
    """Check that a run that resumes searches for nothing: Lightning then forgets its optimizer's state and its step.

    Args:
        trainer: the trainer, before it restores the training.

    Raises:
        UserError: there is a callback that searches for a batch size or a learning rate.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    for callback in callbacks:
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} would let a resumed run begin at step 0 with a new "
                "optimizer: leave it out, and give the value that it found"
            )
