"""Draws what the heads compare, every few epochs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from distill.module import ClassificationModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HeadPictures(Callback):
    """Lets every head that can `plot` draw a few samples of the epoch's first batch.

    The pictures go into `pictures/` beside the checkpoints, and to wandb where that is the logger.

    Args:
        every_n_epochs: how often.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        self.every_n_epochs = every_n_epochs
        self._batch: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batch that the epoch begins with."""
        if batch_idx == 0 or self._batch is None:
            self._batch = batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, with the student as it is now and in eval mode."""
        if self._batch is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        assert isinstance(pl_module, ClassificationModule)
        batch, self._batch = self._batch, None
        was_training = pl_module.student.training
        pl_module.student.eval()
        with torch.no_grad():
            student, teacher = pl_module.see(batch["image"])
        pl_module.student.train(was_training)
        if teacher is None or not trainer.is_global_zero:
            return
        for name, term in pl_module.terms.items():
            figure = term.head.plot(student, teacher, batch)
            if figure is not None:
                self._show(trainer, name, figure)

    def _show(self, trainer: Trainer, name: str, figure: Figure) -> None:
        checkpoints = trainer.checkpoint_callback.dirpath if trainer.checkpoint_callback else None  # type: ignore[attr-defined]  # Lightning has it
        folder = Path(checkpoints).parent if checkpoints else Path(trainer.default_root_dir)
        path = folder / "pictures" / f"{name}-epoch-{trainer.current_epoch}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"pictures/{name}", [str(path)], step=trainer.global_step)
