"""Accuracy of the student's embedding by its nearest neighbors, during training."""

from __future__ import annotations

from copy import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it

from distill.data import ImageData, Split
from distill.data.sources import listed_labels
from distill.errors import UserError, require_at_least
from distill.knn import probe
from distill.training.classification import ClassificationModule


class KNNProbe(Callback):
    """Classifies validation images by the nearest training images in the student's embedding, every few epochs.

    The top-1 accuracy is logged as `val/knn_top1` with the other figures of a validation, see `distill probe`, and is
    that of the same weights: in a run with a weight average, of those that `model.evaluation_weights` chooses.
    Training images are embedded without augmentation. Every rank computes it over all images.

    A validation in an epoch without a probe, or without a batch, has no such figure. It can be monitored if every
    validation has one, or if `checkpoint.every_n_epochs` compares checkpoints only then.

    Args:
        every_n_epochs: number of epochs between two probes.
        neighbors: number of training images that vote.
        temperature: of a vote's weight, exp(cosine / temperature).
        data: labeled images to probe on, such as those of another task or with more labels; by default those that the
            run trains on (after any `longtail`, `labels_per_class` or `train_size`), with the labels that it has.

    Raises:
        UserError: a number is out of range; the student has no embedding; the training images have no labels or fewer
            than `neighbors`; no validation image has one; the images are not those of a data module of distill.
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
        self._top1: float | None = None  # of the validation in progress

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
        if stage in ("fit", "validate"):
            data.prepare_data()
            self._require_neighbors(data)
            if trainer.limit_val_batches != 0:  # else there is no probe
                _require_queries(data)

    def _require_neighbors(self, data: ImageData) -> None:
        labeled = _labeled(data, "train")
        if labeled is not None and self.neighbors > labeled:
            raise UserError(
                f"trainer.callbacks: KNNProbe.neighbors is {self.neighbors}, more than the {labeled} labeled training "
                "images"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the result of an earlier validation, which Lightning would keep for checkpoints and results."""
        self._top1 = None
        for name in self.logs:
            trainer.callback_metrics.pop(name, None)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Probe the student before the first batch.

        Between the beginning and the end of a validation, other callbacks have exchanged the weights, whatever their
        order in the trainer.
        """
        if self._top1 is not None or not self._is_due(trainer):
            return
        assert isinstance(pl_module, ClassificationModule)
        data: Any = copy(self.data or trainer.datamodule)  # type: ignore[attr-defined]  # Lightning's Trainer has it
        data.augment = False
        result = probe(pl_module.student, data, self.neighbors, self.temperature, "val", pl_module.device)
        self._top1 = result.top1

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the result."""
        if self._top1 is not None:
            pl_module.log("val/knn_top1", self._top1, sync_dist=True)
        elif self._is_due(trainer):
            rank_zero_warn("KNNProbe: the validation had no batch, so there is no val/knn_top1")

    def _is_due(self, trainer: Trainer) -> bool:
        return not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0


def _require_queries(data: ImageData) -> None:
    if _labeled(data, "val") == 0:
        raise UserError(
            "trainer.callbacks: KNNProbe classifies labeled validation images, but none of those of "
            f"{type(data).__name__} has a label: give others as its data"
        )


def _labeled(data: ImageData, split: Split) -> int | None:
    """Return the number of labeled images; `None` for a source that does not list its labels: `probe` counts them."""
    labels = listed_labels(data.used_source(split))
    return None if labels is None else sum(label >= 0 for label in labels)
