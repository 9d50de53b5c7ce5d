"""Learning-rate schedulers: their settings for Lightning, and a torch wrapper of timm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from distill.errors import UserError, require_at_least, require_finite
from distill.schedules import Schedule
from distill.training.run_info import progress_of

Interval = Literal["epoch", "step"]
"""The time between two steps of a torch scheduler."""


def scheduler_settings(
    source: Callable[[Optimizer], Any] | Schedule, optimizer: Optimizer, interval: Interval, trainer: Trainer
) -> dict[str, Any]:
    """Create a scheduler and return its settings for Lightning.

    Args:
        source: creates a torch scheduler, or is a factor of the learning rate at every step.
        optimizer: the optimizer whose learning rate is scheduled.
        interval: when a torch scheduler steps.
        trainer: knows the length of the run.

    Raises:
        UserError: the scheduler counts epochs, but is to step every step.
    """
    if isinstance(source, Schedule):
        factor = LambdaLR(optimizer, lambda step: source(progress_of(trainer, step)))
        return {"scheduler": factor, "interval": "step"}
    scheduler = source(optimizer)
    if interval != getattr(scheduler, "interval", interval):
        raise UserError(
            f"model.scheduler_interval is {interval!r}, but {type(scheduler).__name__} counts epochs: set it to 'epoch'"
        )
    settings = {"scheduler": scheduler, "interval": interval}
    if hasattr(scheduler, "monitor"):  # Lightning's ReduceLROnPlateau
        settings["monitor"] = scheduler.monitor
    return settings


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
        UserError: a number is not finite or too small.
    """

    interval = "epoch"

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

        require_finite(warmup_lr=warmup_lr, min_lr=min_lr, decay_rate=decay_rate)
        require_at_least(1, num_epochs=num_epochs, decay_epochs=decay_epochs)
        require_at_least(0, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, min_lr=min_lr, decay_rate=decay_rate)
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
