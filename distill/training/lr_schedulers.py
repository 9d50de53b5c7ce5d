"""Torch wrapper of timm's learning-rate schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill.errors import require_at_least


class TimmScheduler(LRScheduler):
    """A timm learning-rate scheduler, selected by name and stepped once per epoch.

    Args:
        optimizer: the optimizer whose learning rate is scheduled.
        sched: `cosine`, `tanh`, `step`, `multistep` or `poly`.
        num_epochs: length of the run in epochs, without cooldown.
        warmup_epochs: length of the linear warm-up in epochs.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: final learning rate.
        decay_epochs: epochs between two decays (`step`).
        decay_milestones: epochs of the decays (`multistep`).
        decay_rate: factor of the learning rate at each decay.
        warmup_prefix: whether the warm-up comes before the schedule instead of replacing its beginning.

    Raises:
        UserError: a length is below 1, or a length of the warm-up or a rate is negative.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sched: str = "cosine",
        num_epochs: int = 300,
        warmup_epochs: int = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        decay_epochs: int = 90,
        decay_milestones: Sequence[int] = (90, 180, 270),
        decay_rate: float = 0.1,
        warmup_prefix: bool = False,
    ) -> None:
        require_at_least(1, num_epochs=num_epochs, decay_epochs=decay_epochs)
        require_at_least(0, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, min_lr=min_lr, decay_rate=decay_rate)
        from timm.scheduler.scheduler_factory import create_scheduler_v2

        self.timm, _ = create_scheduler_v2(
            optimizer,
            sched=sched,
            num_epochs=num_epochs,
            warmup_epochs=warmup_epochs,
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            decay_epochs=decay_epochs,
            decay_milestones=list(decay_milestones),
            decay_rate=decay_rate,
            warmup_prefix=warmup_prefix,
        )
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rates of timm's scheduler after `last_epoch` epochs."""
        self.timm.step(self.last_epoch)
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, which together with the arguments defines the state."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the epoch."""
        self.last_epoch = state_dict["last_epoch"]
