"""LightningModule for training with labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distill import __version__
from distill.distributed import world_size
from distill.errors import UserError, require_at_least
from distill.features import Features
from distill.heads import Batch
from distill.heads.cross_entropy import CrossEntropy
from distill.metrics import IGNORE_INDEX, LongTailAccuracy, classification_metrics
from distill.networks import FrozenTeacher, Network, Teacher
from distill.objective import TASK, TEACHER, Distiller, Losses, Objective, Term
from distill.schedules import Progress, Schedule
from distill.training.checks import require_batch_statistics, require_same_classes
from distill.training.ddp import align_ranks, align_statistics, effective_batch, prepare_ranks
from distill.training.lightning_internals import trainer_of
from distill.training.logged_losses import figures_of, is_logged
from distill.training.non_finite import NonFiniteGuard
from distill.training.optimizer import EffectiveBatch, LRScaling, WeightDecayOn, parameter_groups, scale_learning_rate
from distill.training.run_info import progress_of, run_info

STUDENT = "distiller.student."
"""Prefix of the student's tensor names in a checkpoint."""


class ClassificationModule(LightningModule):
    """Module that trains a network with labels, such as a baseline or a future teacher.

    Args:
        student: the network to train.
        optimizer: any optimizer of torch or timm, as a function of the parameters.
        num_classes: number of classes K; on the command line, taken from the data.
        image_shape: image shape (C, H, W); on the command line, taken from the data.
        task: the loss on the labels with its weight; defaults to cross-entropy with weight 1.
        scheduler: a torch learning-rate scheduler, stepped every `scheduler_interval`, or a
            `distill.schedules.Schedule`, a factor of the learning rate at every step that knows the length of the run.
        scheduler_interval: whether a torch scheduler steps every epoch or every optimizer step.
        weight_decay_on: parameters with weight decay: `all`, or `matrices`, which exempts parameters of one dimension
            (biases, norms) and those that the network itself exempts, as in timm.
        lr_scaling: rule that scales the optimizer's learning rate to the effective batch: `linear` multiplies it by
            effective batch / `lr_base_size`, `sqrt` by the square root of that ratio. Learning rates set in the
            scheduler are not scaled, and a resumed run keeps those of its checkpoint.
        lr_base_size: effective batch that the learning rate was chosen for.

    Raises:
        UserError: the network cannot be built, or the task's head does not fit it.
    """

    def __init__(
        self,
        student: Network,
        optimizer: OptimizerCallable,
        num_classes: int,
        image_shape: tuple[int, int, int],
        task: Term | None = None,
        scheduler: LRSchedulerCallable | Schedule | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        weight_decay_on: WeightDecayOn = "all",
        lr_scaling: LRScaling = "none",
        lr_base_size: int = 256,
    ) -> None:
        super().__init__()
        require_at_least(1, lr_base_size=lr_base_size)
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.weight_decay_on: WeightDecayOn = weight_decay_on
        self.lr_scaling: LRScaling = lr_scaling
        self.lr_base_size = lr_base_size
        build(student, "model.student", num_classes, image_shape)
        self.distiller = self.make_distiller(student, {TASK: task or Term(CrossEntropy())})
        self.val_metrics = classification_metrics(num_classes, "val")
        self.test_metrics = classification_metrics(num_classes, "test")
        self.longtail_metrics: LongTailAccuracy | None = None
        self._guard = NonFiniteGuard()

    def make_distiller(self, student: Network, terms: dict[str, Term | None]) -> Distiller:
        """Combine the student, its teachers and the objective.

        Args:
            student: the built student.
            terms: the task's term, by name.
        """
        return Distiller(student, None, Objective(terms, student.spec))

    @property
    def student(self) -> Network:
        """The network being trained."""
        return self.distiller.student

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """The teachers by name; the one of `model.teacher` is called `teacher`."""
        named: Any = self.distiller.teachers
        return dict(named.items())

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The network of `model.teacher`, if there is one."""
        teacher = self.teachers.get(TEACHER)
        return teacher if isinstance(teacher, FrozenTeacher) else None

    @property
    def terms(self) -> Mapping[str, Term]:
        """The terms of the loss, by name."""
        return self.distiller.objective.terms

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits `[B, K]` of images `[B, C, H, W]` in [0, 1]."""
        logits: Tensor = self.student(image)["logits"]
        return logits

    def extract_features(self, image: Tensor) -> tuple[Features, dict[str, Features]]:
        """Compute the student's features of images `[B, C, H, W]`, and those of every teacher by name."""
        return self.student(image), self.distiller.teacher_features(image, self.distiller.teachers)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the weighted sum of all terms on a batch."""
        losses: Losses = self.distiller(batch, self._progress())
        self._guard.check(self.global_step, losses.values)
        size, loss = len(batch["image"]), losses.total.detach()
        if trainer_of(self) is not None and is_logged(self.trainer, self.global_step + 1):
            figures = figures_of(losses) | {"lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
            loss = figures.pop("loss")
            self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=size)
        elif world_size() > 1:
            return losses.total  # its own loss would be another on each rank, and so would what depends on it
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return losses.total

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
        """Compute the class probabilities `[B, K]`; `index` identifies the samples."""
        return {"index": batch["index"], "probability": self(batch["image"]).float().softmax(dim=1)}

    def setup(self, stage: str) -> None:
        """Prepare the module for DDP before the strategy wraps it, and the metrics of a test on long-tailed data."""
        prepare_ranks(self, self.trainer)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
        self.longtail_metrics = None
        if stage == "test" and getattr(data, "longtail", None) is not None:
            self.longtail_metrics = LongTailAccuracy(self.num_classes, data.longtail.groups(data.class_counts()))

    def configure_optimizers(self) -> Any:
        """Create the optimizer of the student's and heads' parameters, and the scheduler."""
        batch = None if self.lr_scaling == "none" else effective_batch(self.trainer)
        optimizer, description = self.make_optimizer(batch)
        if batch is not None:
            rank_zero_info(f"learning rate: {description}")
        if self.scheduler is None:
            return optimizer
        scheduler: Any
        if isinstance(self.scheduler, Schedule):
            factor, interval = self.scheduler, "step"
            scheduler = LambdaLR(optimizer, lambda step: factor(progress_of(self.trainer, step)))
        else:
            scheduler, interval = self.scheduler(optimizer), self.scheduler_interval
        settings = {"scheduler": scheduler, "interval": interval}
        if hasattr(scheduler, "monitor"):  # Lightning's ReduceLROnPlateau
            settings["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def make_optimizer(self, batch: EffectiveBatch | None) -> tuple[Optimizer, str]:
        """Create the optimizer with its scaled learning rate, and a description of the scaling.

        Raises:
            UserError: the learning rate is to be scaled, but the batch size is unknown.
        """
        if batch is None and self.lr_scaling != "none":
            raise UserError(
                f"model.lr_scaling is {self.lr_scaling!r}, but the data have no batch_size: set it to 'none'"
            )
        exempt: set[str] = getattr(self.student.model, "no_weight_decay", set)()
        groups = parameter_groups(self, self.weight_decay_on, {f"{STUDENT}model.{name}" for name in exempt})
        optimizer = self.optimizer(groups)
        return optimizer, scale_learning_rate(optimizer, self.lr_scaling, batch, self.lr_base_size)

    def on_fit_start(self) -> None:
        """Align the ranks and check that all terms fit the run, before step 0."""
        align_ranks(self, self.trainer.train_dataloader)
        run = run_info(self.trainer)
        require_batch_statistics(self.student, run)
        self.distiller.objective.prepare(run)

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
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside of training, skip tensors of the heads that do not fit, since only the student is needed."""
        require_same_classes(checkpoint, self.student, self.num_classes)
        if trainer_of(self) is not None and self.trainer.state.fn != "fit":
            saved = checkpoint["state_dict"]
            student = {name: tensor for name, tensor in saved.items() if name.startswith(STUDENT)}
            rest = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(STUDENT)}
            same = {name: saved[name] for name, tensor in rest.items() if _shape(saved.get(name)) == tensor.shape}
            checkpoint["state_dict"] = student | rest | same

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights.

        Raises:
            UserError: their names or shapes are not those of this module.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            current = self.state_dict()
            different = sorted(
                name for name in {*current, *state_dict} if _shape(current.get(name)) != _shape(state_dict.get(name))
            )
            shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            raise UserError(
                f"ckpt_path: the checkpoint does not fit this model (they differ in {shown}); use the configuration "
                "that it was trained with"
            ) from error

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> tuple[Features, Tensor]:
        student: Features = self.student(batch["image"])
        counted = batch["index"] >= 0
        label = torch.where(counted, batch["label"], IGNORE_INDEX)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(student["logits"].float().softmax(dim=1), label)
        self.log_dict(metrics, batch_size=len(label))
        if stage == "test" and self.longtail_metrics is not None:
            self.longtail_metrics.update(student["logits"], label)
        return student, counted

    def _progress(self) -> Progress:
        trainer = trainer_of(self)
        return Progress() if trainer is None else progress_of(trainer, self.global_step)


def build(network: Network, key: str, num_classes: int, image_shape: tuple[int, int, int], learns: bool = True) -> None:
    """Build a network that learns or teaches; an error in it names the configuration key `key`."""
    try:
        network.build(num_classes, image_shape, learns)
    except UserError as error:
        raise error.at(key) from None


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
