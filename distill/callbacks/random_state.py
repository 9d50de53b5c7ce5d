"""Keeps the global random states in the checkpoints, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from distill.randomness import get_states, set_states


class RandomState(Callback):
    """Saves the global random states of Python, NumPy and torch, and sets them before the first step after a resume.

    Data order and augmentation do not depend on them (see `distill.data`); dropout and drop-path do.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states as they are now."""
        return get_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first step: what comes before may draw."""
        self._waiting = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the states once."""
        if self._waiting is not None:
            set_states(self._waiting)
            self._waiting = None
