"""Accuracy of the student's embedding by its nearest neighbors, during training."""

from __future__ import annotations

from copy import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from distill.data import ImageData
from distill.errors import UserError, require_at_least
from distill.knn import probe
from distill.training.classification import ClassificationModule


class KNNProbe(Callback):
    """Classifies validation images by the nearest training images in the student's embedding, every few epochs.

    The top-1 accuracy is logged as `val/knn_top1` with the other figures of a validation, see `distill probe`. Training
    images are embedded without augmentation. Every rank computes it over all images.

    Args:
        every_n_epochs: number of epochs between two probes.
        neighbors: number of training images that vote.
        temperature: of a vote's weight, exp(cosine / temperature).
        data: labeled images to probe on, such as those of another task; by default those of the run.

    Raises:
        UserError: a number is out of range; the student has no embedding; the images have no labels, or are not those
            of a data module of distill.
    """

    logs = ("val/knn_top1",)

    def __init__(
        self,
        every_n_epochs: int = 1,
        neighbors: int = 20,
        temperature: float = 0.07,
        data: ImageData | None = None,
    ) -> None:
        require_at_least(1, every_n_epochs=every_n_epochs, neighbors=neighbors)
        self.every_n_epochs = every_n_epochs
        self.neighbors = neighbors
        self.temperature = temperature
        self.data = data

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are labels and an embedding."""
        data = self.data or getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageData) or data.num_classes == 0:
            has = f"{type(data).__name__} has none" if isinstance(data, ImageData) else f"given {data!r}"
            raise UserError(
                f"trainer.callbacks: KNNProbe needs a data module of distill with labels, {has}: give one as its data"
            )
        assert isinstance(pl_module, ClassificationModule)
        if pl_module.student.spec.embedding is None:
            raise UserError(f"trainer.callbacks: KNNProbe needs an embedding, but {pl_module.student.name} gives none")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the student, which is in eval mode."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        assert isinstance(pl_module, ClassificationModule)
        data: Any = copy(self.data or trainer.datamodule)  # type: ignore[attr-defined]  # Lightning's Trainer has it
        data.augment = False
        result = probe(pl_module.student, data, self.neighbors, self.temperature, "val", pl_module.device)
        pl_module.log("val/knn_top1", result.top1, sync_dist=True)
