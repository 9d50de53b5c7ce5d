"""The LightningModule of a network trained with labels."""

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
from distill.errors import UserError, require_at_least
from distill.features import Features
from distill.heads import Batch
from distill.heads.cross_entropy import CrossEntropy
from distill.metrics import IGNORE_INDEX, LongTailAccuracy, classification_metrics
from distill.networks import FrozenTeacher, Network
from distill.objective import TASK, TEACHER, Distiller, Losses, Objective, Term
from distill.schedules import Progress, Schedule
from distill.training.ddp import align_ranks, effective_batch, prepare_ranks
from distill.training.lightning_internals import trainer_of
from distill.training.non_finite import NonFiniteGuard
from distill.training.optimizer import EffectiveBatch, LRScaling, WeightDecayOn, parameter_groups, scale_learning_rate
from distill.training.run_info import progress_of, run_info

STUDENT = "distiller.student."
"""Prefix of the student's tensors in a checkpoint."""


class ClassificationModule(LightningModule):
    """A network trained with labels: a teacher to be, or a baseline.

    Args:
        student: the network that is trained.
        optimizer: any optimizer of torch or timm, as a function of the parameters.
        num_classes: K; on the command line it comes from the data.
        image_shape: (C, H, W) of the images; on the command line it comes from the data.
        task: the loss on the labels and its weight; cross-entropy of weight 1 if not given.
        scheduler: the learning rate over time: one of torch's schedulers, stepped every `scheduler_interval`; or a
            `distill.schedules.Schedule`, a factor at every step that knows the length of the run.
        scheduler_interval: what steps a torch scheduler.
        weight_decay_on: parameters that the optimizer's weight decay applies to: `all`, or `matrices`: none of one
            dimension (biases, norms) and none that the network itself exempts, as in timm.
        lr_scaling: multiplies the optimizer's learning rate by effective batch / `lr_base_size`, `linear`, or by its
            square root, `sqrt`. Rates that a scheduler has of its own stay, and a resumed run keeps its checkpoint's.
        lr_base_size: the effective batch that the learning rate was chosen for.

    Raises:
        UserError: the network cannot be made, or the task's head does not fit it.
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
        """Put the student, its teachers and its objective together.

        Args:
            student: built.
            terms: the task.
        """
        return Distiller(student, None, Objective(terms, student.spec))

    @property
    def student(self) -> Network:
        """The network that is trained."""
        return self.distiller.student

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The frozen teacher, if there is one."""
        teachers: Mapping[str, Any] = dict(self.distiller.teachers.items())
        return teachers.get(TEACHER)

    @property
    def terms(self) -> Mapping[str, Term]:
        """The terms of the loss, by name."""
        return self.distiller.objective.terms

    def forward(self, image: Tensor) -> Tensor:
        """Class scores `[B, K]` of images `[B, C, H, W]` in [0, 1]."""
        logits: Tensor = self.student(image)["logits"]
        return logits

    def extract_features(self, image: Tensor) -> tuple[Features, Features | None]:
        """The student's features of images `[B, C, H, W]`, and the teacher's if there is one."""
        teacher = self.teacher
        return self.student(image), None if teacher is None else teacher(image)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of all terms on one batch."""
        losses: Losses = self.distiller(batch, self._progress())
        self._guard.check(self.global_step, losses.values)
        self.log("train/loss", losses.total.detach(), prog_bar=True, batch_size=len(batch["image"]))
        if trainer_of(self) is not None and self._is_shown():
            self._log_terms(losses, len(batch["image"]))
        return losses.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch into the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch into the test metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities `[B, K]` and the `index` of each sample."""
        return {"index": batch["index"], "probability": self(batch["image"]).float().softmax(dim=1)}

    def setup(self, stage: str) -> None:
        """Settle what many ranks ask for, before the strategy does, and prepare what a test on a long tail reports."""
        prepare_ranks(self, self.trainer)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
        self.longtail_metrics = None
        if stage == "test" and getattr(data, "longtail", None) is not None:
            self.longtail_metrics = LongTailAccuracy(self.num_classes, data.longtail.groups(data.class_counts()))

    def configure_optimizers(self) -> Any:
        """The optimizer of all that learns: the student and the heads' own parameters."""
        batch = None if self.lr_scaling == "none" else effective_batch(self.trainer)
        optimizer, told = self.make_optimizer(batch)
        if batch is not None:
            rank_zero_info(f"learning rate: {told}")
        if self.scheduler is None:
            return optimizer
        scheduler: Any
        if isinstance(self.scheduler, Schedule):
            factor, interval = self.scheduler, "step"
            scheduler = LambdaLR(optimizer, lambda step: factor(progress_of(self.trainer, step)))
        else:
            scheduler, interval = self.scheduler(optimizer), self.scheduler_interval
        settings = {"scheduler": scheduler, "interval": interval}
        if hasattr(scheduler, "monitor"):  # the ReduceLROnPlateau of Lightning names what it looks at
            settings["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def make_optimizer(self, batch: EffectiveBatch | None) -> tuple[Optimizer, str]:
        """The optimizer, with its learning rate scaled to the effective batch, and in words what became of the rate."""
        if batch is None and self.lr_scaling != "none":
            raise UserError(f"model.lr_scaling is {self.lr_scaling!r}, but the data have no batch_size: set it to none")
        exempt: set[str] = getattr(self.student.model, "no_weight_decay", set)()
        groups = parameter_groups(self, self.weight_decay_on, {f"{STUDENT}model.{name}" for name in exempt})
        optimizer = self.optimizer(groups)
        return optimizer, scale_learning_rate(optimizer, self.lr_scaling, batch, self.lr_base_size)

    def on_fit_start(self) -> None:
        """Check ranks and terms against the run: what cannot work stops it before step 0."""
        align_ranks(self, self.trainer.train_dataloader)
        self.distiller.objective.prepare(run_info(self.trainer))

    def on_test_epoch_end(self) -> None:
        """Report on many-, medium- and few-shot classes, if the data are long-tailed."""
        if self.longtail_metrics is not None:
            found = self.longtail_metrics.compute()
            self.log_dict({f"test/{name}": value for name, value in found.items()}, sync_dist=True)
            self.longtail_metrics.reset()

    def on_train_epoch_end(self) -> None:
        """Wait for the last verdicts on the epoch's losses."""
        self._guard.flush()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the student without this run; save nothing after a loss that was not finite."""
        self._guard.flush()
        checkpoint["distill"] = {
            "version": __version__,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside of training only the student must fit: the heads of that run may be others than those of this one."""
        if trainer_of(self) is not None and self.trainer.state.fn != "fit":
            saved = checkpoint["state_dict"]
            student = {name: tensor for name, tensor in saved.items() if name.startswith(STUDENT)}
            rest = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(STUDENT)}
            same = {name: saved[name] for name, tensor in rest.items() if _shape(saved.get(name)) == tensor.shape}
            checkpoint["state_dict"] = student | rest | same

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; raise a `UserError` in one sentence if they are not this module's."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            ours = self.state_dict()
            strange = sorted(
                name for name in {*ours, *state_dict} if _shape(ours.get(name)) != _shape(state_dict.get(name))
            )
            shown = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
            raise UserError(
                f"ckpt_path: the checkpoint is not of this model, they differ in {shown}; give the configuration "
                "that it was trained with"
            ) from error

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> tuple[Features, Features | None, Tensor]:
        student, teacher = self.extract_features(batch["image"])
        counted = batch["index"] >= 0
        label = torch.where(counted, batch["label"], IGNORE_INDEX)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(student["logits"].float().softmax(dim=1), label)
        self.log_dict(metrics, batch_size=len(label))
        if stage == "test" and self.longtail_metrics is not None:
            self.longtail_metrics.update(student["logits"], label)
        return student, teacher, counted

    def _progress(self) -> Progress:
        trainer = trainer_of(self)
        return Progress() if trainer is None else progress_of(trainer, self.global_step)

    def _is_shown(self) -> bool:
        """Whether anything reads this step's terms: a logger, or what looks at the end of an epoch or of the run.

        Lightning takes a third of a millisecond for each value, and throws it away on the steps between.
        """
        step = self.global_step + 1
        last = self.trainer.is_last_batch or step == self.trainer.max_steps or self.trainer.should_stop
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's Trainer has it
        return last or step % max(every, 1) == 0

    def _log_terms(self, losses: Losses, batch_size: int) -> None:
        shown: dict[str, Any] = {"train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
        for name, value in losses.values.items():
            raw = value.detach()
            shown[f"train/{name}"] = raw
            shown[f"train/{name}_weight"] = losses.weights[name]
            shown[f"train/{name}_weighted"] = losses.weights[name] * raw
            shown |= {f"train/{name}/{key}": figure for key, figure in losses.diagnostics[name].items()}
        self.log_dict(shown, batch_size=batch_size)


def build(network: Network, key: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Build a network; a mistake in it is one of the configuration key `key`."""
    try:
        network.build(num_classes, image_shape)
    except UserError as error:
        raise error.at(key) from None


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
