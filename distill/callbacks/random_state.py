"""Global random states in checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from distill.randomness import get_states, set_states


class RandomState(Callback):
    """Saves the global random states of Python, NumPy and torch, and restores them before a resumed run's first step.

    Dropout and drop-path depend on these states; data order and augmentation do not (see `distill.data`). All ranks
    begin with equal states and draw alike, each on its own device: those of rank 0, which are saved, are those of all.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the current states, or those that are to be restored."""
        return get_states() if self._loaded is None else self._loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first step, since random numbers may be drawn before it."""
        self._loaded = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the states once."""
        if self._loaded is not None:
            set_states(self._loaded)
            self._loaded = None
