"""LightningModule for training with labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from distill import __version__
from distill.distiller import Distiller, ViewPasses
from distill.errors import UserError, require_at_least
from distill.features import Features
from distill.functional.labels import hard_labels
from distill.heads import Batch
from distill.heads.cross_entropy import CrossEntropy
from distill.metrics import IGNORE_INDEX, LongTailAccuracy, classification_metrics
from distill.networks import Network
from distill.objective import TASK, Losses, Objective, Term
from distill.schedules import Schedule, bounds_of
from distill.training.base import DistillerModule, build
from distill.training.batch_size_search import require_no_search, require_valid_search
from distill.training.batches import counted_images
from distill.training.checks import require_batch_statistics, require_labels, require_same_classes, told_by
from distill.training.continuation import Continuation
from distill.training.ddp import (
    align_ranks,
    align_statistics,
    choose_unused_parameter_detection,
    effective_batch,
    prepare_ranks,
)
from distill.training.lightning_internals import trainer_of
from distill.training.loading import STUDENT, differences, student_and_what_fits
from distill.training.logged_losses import log_losses
from distill.training.lr_schedulers import Interval, scheduler_settings
from distill.training.non_finite import NonFiniteGuard
from distill.training.optimizer import (
    EffectiveBatch,
    LRScaling,
    WeightDecayOn,
    parameter_groups,
    require_valid_settings,
    scale_learning_rate,
)
from distill.training.run_info import accumulation_weight, log_every_epoch, require_trainable, run_info
from distill.training.weight_averaging import WeightsChoice, WholeAverages, evaluated_weights


class ClassificationModule(DistillerModule):
    """Module that trains a network with labels, such as a baseline or a future teacher.

    Args:
        student: the network to train.
        optimizer: any optimizer of torch or timm, as a function of the parameters.
        num_classes: number of classes K, 0 for images without labels; by default that of `data`.
        image_shape: image shape (C, H, W); by default that of `data`.
        task: the loss on the labels with its weight, or `None` for no such loss. By default, cross-entropy with weight
            1 if there are labels and the student has a classifier, else none.
        scheduler: a torch learning-rate scheduler, stepped every `scheduler_interval`, or a
            `distill.schedules.Schedule`, a factor of the learning rate at every step that knows the length of the run.
        scheduler_interval: whether a torch scheduler steps every epoch or every optimizer step.
        weight_decay_on: parameters with weight decay: `all`, or `matrices`, which exempts parameters of one dimension
            (biases, norms) and those that the network itself exempts, as in timm.
        lr_scaling: rule that scales the optimizer's learning rate to the effective batch: `linear` multiplies it by
            effective batch / `lr_base_size`, `sqrt` by the square root of that ratio. Learning rates set in the
            scheduler are not scaled. Lightning's `BatchSizeFinder`, which changes the batch afterwards, is refused.
        lr_base_size: effective batch that the learning rate was chosen for.
        view_passes: whether the student runs once for each view of the images (`data.train_views`), `separate`, or once
            for all, `joint`; by default `separate` if it has BatchNorm.
        evaluation_weights: weights that validation, test and prediction take in a run with a weight average, such as
            Lightning's `EMAWeightAveraging`: `averaged` (the default) or `current`.
        batch: keys (or places in a tuple) under which the data yield the entries of a batch, if they have others than
            `as_batch` knows, such as `{"image": "x", "label": "y"}`.
        data: the data module, asked for the number of classes and the shape of the images where these are not given.

    Raises:
        UserError: the network cannot be built, the task's head does not fit it, or the number of classes or the shape
            of the images is not known.
    """

    def __init__(
        self,
        student: Network,
        optimizer: OptimizerCallable,
        num_classes: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
        task: Term | Literal["auto"] | None = "auto",
        scheduler: LRSchedulerCallable | Schedule | None = None,
        scheduler_interval: Interval = "epoch",
        weight_decay_on: WeightDecayOn = "all",
        lr_scaling: LRScaling = "none",
        lr_base_size: int = 256,
        view_passes: ViewPasses | None = None,
        evaluation_weights: WeightsChoice | None = None,
        batch: dict[str, str | int] | None = None,
        data: Any = None,
    ) -> None:
        super().__init__()
        require_at_least(1, lr_base_size=lr_base_size)
        if isinstance(scheduler, Schedule) and (bounds := bounds_of(scheduler)) is not None and bounds[0] < 0:
            raise UserError(f"scheduler: a learning rate cannot be negative, but the factor reaches {bounds[0]:g}")
        self.num_classes: int = told_by("num_classes", num_classes, data)
        self.image_shape = told_by("image_shape", image_shape, data)
        self.batch_names = batch
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval: Interval = scheduler_interval
        self.weight_decay_on: WeightDecayOn = weight_decay_on
        self.lr_scaling: LRScaling = lr_scaling
        self.lr_base_size = lr_base_size
        self.evaluation_weights = evaluation_weights
        build(student, "model.student", self.num_classes, self.image_shape)
        is_classified = self.num_classes > 0 and student.spec.logits is not None
        if task == "auto":
            task = Term(CrossEntropy()) if is_classified else None
        self.distiller = self.make_distiller(student, {TASK: task})
        self.distiller.view_passes = view_passes or self.distiller.view_passes
        self.val_metrics = classification_metrics(self.num_classes, "val") if is_classified else None
        self.test_metrics = classification_metrics(self.num_classes, "test") if is_classified else None
        self.longtail_metrics: LongTailAccuracy | None = None
        self._guard = NonFiniteGuard()
        self._continuation = Continuation()

    def make_distiller(self, student: Network, terms: dict[str, Term | None]) -> Distiller:
        """Combine the student, its teachers and the objective.

        Args:
            student: the built student.
            terms: the task's term, by name.
        """
        require_labels(terms, self.num_classes)
        return Distiller(student, None, Objective(terms, student.spec))

    @property
    def monitor(self) -> tuple[str, Literal["max", "min"]]:
        """The metric of a validation that tells the best checkpoint, and whether the largest or smallest is best."""
        return "val/top1", "max"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the weighted sum of all terms on a batch."""
        losses: Losses = self.distiller(batch, self._progress())
        self._guard.check(self.global_step, losses.values)
        log_losses(self, losses, len(batch["image"]))
        trainer = trainer_of(self)
        share = 1.0 if trainer is None else accumulation_weight(trainer, batch_idx)
        return losses.total if share == 1.0 else losses.total * share

    def on_validation_epoch_start(self) -> None:
        """Evaluate the same weights and statistics on all ranks."""
        align_statistics(self.student)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Compute `probability` of the classes `[B, K]`, or without a classifier `embedding`; `index` where known."""
        index = {"index": batch["index"]} if "index" in batch else {}
        output = self(batch["image"]).float()
        has_classes = self.student.output_feature == "logits"
        return index | ({"probability": output.softmax(dim=1)} if has_classes else {"embedding": output})

    def setup(self, stage: str) -> None:
        """Prepare the module for DDP before the strategy wraps it, and the metrics of a test on long-tailed data."""
        prepare_ranks(self, self.trainer)
        if stage == "fit":
            self._continuation = Continuation()
            require_trainable(self.trainer)
            require_valid_search(self.trainer, self.lr_scaling, self.terms)
            choose_unused_parameter_detection(self, self.num_classes, self.trainer)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
        self.longtail_metrics = None
        if stage == "test" and getattr(data, "longtail", None) is not None and self.test_metrics is not None:
            self.longtail_metrics = LongTailAccuracy(self.num_classes, data.longtail.groups(data.class_counts()))

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that keeps memories out of weight averages, unless an earlier run of the trainer has."""
        choice = self.evaluation_weights or "averaged"
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        found = [callback for callback in callbacks if isinstance(callback, WholeAverages)]
        for callback in found:
            callback.evaluated = choice
        return [] if found else [WholeAverages(choice)]

    def configure_optimizers(self) -> Any:
        """Create the optimizer of the student's and heads' parameters, and the scheduler."""
        batch = None if self.lr_scaling == "none" else effective_batch(self.trainer)
        optimizer, description = self.make_optimizer(batch)
        if batch is not None:
            rank_zero_info(f"learning rate: {description}")
        scheduler = None
        if self.scheduler is not None:
            scheduler = scheduler_settings(self.scheduler, optimizer, self.scheduler_interval, self.trainer)
        self._continuation.configure(optimizer, scheduler, self.scheduler, self.optimizer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def make_optimizer(self, batch: EffectiveBatch | None) -> tuple[Optimizer, str]:
        """Create the optimizer with its scaled learning rate, and a description of the scaling.

        Raises:
            UserError: the learning rate is to be scaled, but the batch size is unknown, or a setting is not finite.
        """
        if batch is None and self.lr_scaling != "none":
            raise UserError(
                f"model.lr_scaling is {self.lr_scaling!r}, but the data have no batch_size: set it to 'none'"
            )
        exempt: set[str] = getattr(self.student.model, "no_weight_decay", set)()
        groups = parameter_groups(self, self.weight_decay_on, {f"{STUDENT}model.{name}" for name in exempt})
        optimizer = self.optimizer(groups)
        require_valid_settings(optimizer)
        return optimizer, scale_learning_rate(optimizer, self.lr_scaling, batch, self.lr_base_size)

    def on_fit_start(self) -> None:
        """Align the ranks and check that all terms fit the run, before step 0."""
        align_ranks(self, self.trainer.train_dataloader)
        run = run_info(self.trainer)
        require_batch_statistics(self.student, run)
        self.distiller.objective.prepare(run)
        log_every_epoch(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of many-, medium- and few-shot classes if the data are long-tailed."""
        if self.longtail_metrics is not None:
            accuracies = self.longtail_metrics.compute()
            self.log_dict({f"test/{name}": value for name, value in accuracies.items()}, sync_dist=True)
            self.longtail_metrics.reset()

    def on_train_epoch_end(self) -> None:
        """Wait for the pending checks of the epoch's losses."""
        self._guard.flush()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the facts needed to rebuild the student; raise instead of saving after a non-finite loss."""
        self._guard.flush()
        checkpoint["distill"] = {
            "version": __version__,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
            "optimizer": self._continuation.settings,
            "student": self.student.facts(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside of training, skip tensors of the heads that do not fit, since only the student is needed."""
        require_same_classes(checkpoint, self.student, self.num_classes)
        if trainer_of(self) is None:
            return
        if self.trainer.state.fn == "fit":
            if self._continuation.settings is None:  # later, a search restores a checkpoint of its own
                require_no_search(self.trainer)
            self._continuation.load(checkpoint, self.trainer)
        else:
            weights = evaluated_weights(checkpoint, self.evaluation_weights, "model.evaluation_weights")
            checkpoint["state_dict"] = student_and_what_fits(weights, self.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights.

        Raises:
            UserError: their names or shapes are not those of this module.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            shown = differences(state_dict, self.state_dict())
            raise UserError(
                f"ckpt_path: the checkpoint does not fit this model (they differ in {shown}); use the configuration "
                "that it was trained with"
            ) from error

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> tuple[Features, Tensor]:
        student: Features = self.student(batch["image"])
        counted = counted_images(batch)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        if metrics is None or "label" not in batch:
            return student, counted
        label = torch.where(counted, hard_labels(batch["label"]), IGNORE_INDEX)
        metrics.update(student["logits"].float().softmax(dim=1), label)
        self.log_dict(metrics, batch_size=len(label))
        if stage == "test" and self.longtail_metrics is not None:
            self.longtail_metrics.update(student["logits"], label)
        return student, counted
