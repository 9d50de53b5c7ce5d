"""Plots of what the heads compare, during training or once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it
from torch import Tensor

from distill.callbacks.checkpoint import run_checkpoint
from distill.callbacks.results import Results
from distill.errors import UserError
from distill.heads import Head
from distill.networks.modes import eval_mode
from distill.plotting.saving import save_figure
from distill.store import StoredFeatures
from distill.training.classification import ClassificationModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HeadPictures(Callback):
    """Plots a few samples of an epoch's first batch with every head that implements `plot`.

    The pictures are saved in the run's folder (see `pictures_folder`), and logged to wandb if that is a logger. A
    `fast_dev_run` draws none.

    Args:
        every_n_epochs: number of epochs between two plots.

    Raises:
        UserError: `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UserError(f"every_n_epochs must be at least 1, given {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self._batch: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the epoch's first batch."""
        if batch_idx == 0 or self._batch is None:
            self._batch = batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot with the current student in eval mode."""
        if self._batch is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        batch, self._batch = self._batch, None
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning has it
            return
        folder = pictures_folder(trainer)
        for name, figure in _pictures(pl_module, batch):
            path = save_figure(figure, folder / f"{name}-epoch-{trainer.current_epoch}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"pictures/{name}", [str(path)], step=trainer.global_step)


class PicturesOnce(Callback):
    """Plots the first batch of an evaluation with every head that implements `plot`.

    Args:
        folder: folder of the pictures, which are named after the terms.
        images: number of images per picture.

    Attributes:
        written: paths of the written pictures.

    Raises:
        UserError: a picture cannot be written.
    """

    def __init__(self, folder: str | Path, images: int) -> None:
        self.folder = Path(folder)
        self.images = images
        self.written: list[Path] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Plot the first batch."""
        if not self.written and trainer.is_global_zero:
            for name, figure in _pictures(pl_module, batch, images=self.images):
                path = self.folder / f"{name}.png"
                try:
                    self.written.append(save_figure(figure, path))
                except OSError as error:
                    raise UserError(f"output: {str(path)!r} cannot be written: {error.strerror or error}") from error


def pictures_folder(trainer: Trainer) -> Path:
    """Return the folder for the pictures of a training.

    It is `pictures` in the run's folder, that of `results.json`. A trainer without one has it beside its folder
    `checkpoints`, in a folder of checkpoints of any other name, which several runs may have side by side, or without
    checkpoints in `default_root_dir`.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
    folders = [callback.folder for callback in callbacks if isinstance(callback, Results)]
    if folders and folders[0] is not None:
        return Path(folders[0]) / "pictures"
    checkpoint = run_checkpoint(trainer)
    if checkpoint is None or checkpoint.dirpath is None:
        return Path(trainer.default_root_dir) / "pictures"
    checkpoints = Path(checkpoint.dirpath)
    return (checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints) / "pictures"


def can_plot(head: Head) -> bool:
    """Return True if a head implements `plot`."""
    return type(head).plot is not Head.plot


@torch.no_grad()
def _pictures(module: LightningModule, batch: dict[str, Any], **options: int) -> Iterator[tuple[str, Figure]]:
    """Yield the name and figure of each term whose head can plot, without any effect on training."""
    assert isinstance(module, ClassificationModule)
    with eval_mode(module.student):
        student, teachers = module.extract_features(batch)
    student = student.apply(Tensor.float)
    for name, term in module.terms.items():
        teacher = module.distiller.objective.teacher_of(name)
        if not can_plot(term.head) or teacher is None:
            continue
        if isinstance(teachers[teacher], StoredFeatures):
            rank_zero_warn(
                f"the teacher of {name!r} is stored, so nothing is drawn of it: draw with the network itself"
            )
            continue
        figure = term.head.plot(student, teachers[teacher].apply(Tensor.float), batch, **options)
        if figure is not None:
            yield name, figure
