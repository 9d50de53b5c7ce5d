"""The two LightningModules: a network trained with labels, and a student trained with a teacher besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.heads import Batch, Head, Term
from distill.heads.cross_entropy import CrossEntropy
from distill.metrics import UNCOUNTED, LongTailAccuracy, classification_metrics, teacher_metrics
from distill.networks import FrozenTeacher, Network
from distill.schedules import Progress, Schedule
from distill.training.ddp import align_ranks, effective_batch, prepare_ranks
from distill.training.non_finite import FiniteWatch
from distill.training.optimizer import Decayed, EffectiveBatch, Rule, parameter_groups, scale_learning_rate

TASK = "task"
"""The name of the term on the labels."""
Compiled = Literal["none", "student", "teacher", "both"]
_TAKEN = (TASK, "loss", "lr")


class ClassificationModule(LightningModule):
    """A network trained with labels: a teacher to be, or a baseline.

    Args:
        student: the network that is trained.
        optimizer: any optimiser of torch or timm, as a function of the parameters.
        num_classes: K; on the command line it comes from the data.
        image_shape: (C, H, W) of the images; on the command line it comes from the data.
        task: the loss on the labels and its weight; cross-entropy of weight 1 if not given.
        scheduler: the learning rate over time: one of torch's schedulers, stepped every `scheduler_interval`; or a
            `distill.schedules.Schedule`, a factor at every step that knows the length of the run.
        scheduler_interval: what steps a torch scheduler.
        decayed: what the optimiser's weight decay is for: `all` parameters, or `matrices`: none of one dimension
            (biases, norms) and none that the network itself exempts, as timm has it.
        scale_lr: multiply the optimiser's learning rate by effective batch / `lr_batch`, `linear`, or by the root of
            it, `sqrt`. Rates that a scheduler has of its own stay, and a resumed run keeps its checkpoint's.
        lr_batch: the effective batch that the learning rate was chosen for.

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
        decayed: Decayed = "all",
        scale_lr: Rule = "none",
        lr_batch: int = 256,
    ) -> None:
        super().__init__()
        if lr_batch < 1:
            raise UserError(f"lr_batch must be at least 1, given {lr_batch}")
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.decayed: Decayed = decayed
        self.scale_lr: Rule = scale_lr
        self.lr_batch = lr_batch
        self.student = _built(student, "model.student", num_classes, image_shape)
        self.terms: dict[str, Term] = {}
        self.heads = nn.ModuleDict()
        self._add_term(TASK, task or Term(CrossEntropy()), "model.task", None)
        self.val_metrics = classification_metrics(num_classes, "val")
        self.test_metrics = classification_metrics(num_classes, "test")
        self.longtail_metrics: LongTailAccuracy | None = None
        self._watch = FiniteWatch()

    def forward(self, image: Tensor) -> Tensor:
        """Class scores `[B, K]` of images `[B, C, H, W]` in [0, 1]."""
        logits: Tensor = self.student(image)["logits"]
        return logits

    def see(self, image: Tensor) -> tuple[Features, Features | None]:
        """What the student, and the teacher if there is one, see of images `[B, C, H, W]`."""
        return self.student(image), None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of all terms on one batch."""
        student, teacher = self.see(batch["image"])
        progress = self._progress(self.global_step)
        values: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for name, term in self.terms.items():
            term.head.progress = progress
            values[name] = term.head(student, teacher, batch)
            weights[name] = term.weight_at(progress)
        self._watch.watch(self.global_step, values)
        loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["image"]))
        if self._trainer is not None and self._is_shown():
            self._log_terms(values, weights, len(batch["image"]))
        return loss

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
        """The optimiser of all that learns: the student and the heads' own parameters."""
        batch = None if self.scale_lr == "none" else effective_batch(self.trainer)
        optimizer, told = self.make_optimizer(batch)
        if batch is not None:
            rank_zero_info(f"learning rate: {told}")
        if self.scheduler is None:
            return optimizer
        scheduler: Any
        if isinstance(self.scheduler, Schedule):
            factor, interval = self.scheduler, "step"
            scheduler = LambdaLR(optimizer, lambda step: factor(self._progress(step)))
        else:
            scheduler, interval = self.scheduler(optimizer), self.scheduler_interval
        settings = {"scheduler": scheduler, "interval": interval}
        if hasattr(scheduler, "monitor"):  # the ReduceLROnPlateau of Lightning names what it looks at
            settings["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def make_optimizer(self, batch: EffectiveBatch | None) -> tuple[Optimizer, str]:
        """The optimiser, with its learning rate scaled to the effective batch, and in words what became of the rate."""
        if batch is None and self.scale_lr != "none":
            raise UserError(f"model.scale_lr is {self.scale_lr!r}, but the data have no batch_size: set it to none")
        exempt: set[str] = getattr(self.student.model, "no_weight_decay", set)()
        groups = parameter_groups(self, self.decayed, {f"student.model.{name}" for name in exempt})
        optimizer = self.optimizer(groups)
        return optimizer, scale_learning_rate(optimizer, self.scale_lr, batch, self.lr_batch)

    def on_fit_start(self) -> None:
        """Hold the terms against the run and its data: what cannot work stops it before step 0."""
        self._require_terms()
        align_ranks(self, self.trainer.train_dataloader)
        progress = self._progress(0)
        data = getattr(self.trainer.train_dataloader, "dataset", None)
        images = getattr(self.trainer.train_dataloader, "batch_size", None)
        provided = {getattr(callback, "provides", None) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]  # it has
        for name, term in self.terms.items():
            key = "model.task" if name == TASK else f"model.heads.{name}"
            try:
                term.weight_at(progress)
            except UserError as error:
                raise error.at(f"{key}.weight") from None
            try:
                if term.head.needs_segments and "segments" not in provided:
                    raise UserError(
                        f"{type(term.head).__name__} needs segments: add the callback SuperpixelSegments to "
                        "trainer.callbacks"
                    )
                if data is not None:
                    term.head.check_samples(len(data))
                if images is not None:
                    term.head.check_batch(images)
                if term.head.needs_class_counts:
                    term.head.progress = progress
                    term.head.learn_class_counts(self._class_counts(term.head))
            except UserError as error:
                raise error.at(f"{key}.head") from None

    def on_test_epoch_end(self) -> None:
        """Report on many-, medium- and few-shot classes, if the data are long-tailed."""
        if self.longtail_metrics is not None:
            found = self.longtail_metrics.compute()
            self.log_dict({f"test/{name}": value for name, value in found.items()}, sync_dist=True)
            self.longtail_metrics.reset()

    def on_train_epoch_end(self) -> None:
        """Wait for the last verdicts on the epoch's losses."""
        self._watch.settle()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the student without this run; save nothing after a loss that was not finite."""
        self._watch.settle()
        checkpoint["distill"] = {"num_classes": self.num_classes, "image_shape": list(self.image_shape)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside of training only the student must fit: the heads of that run may be others than those of this one."""
        if self._trainer is not None and self.trainer.state.fn != "fit":
            found = checkpoint["state_dict"]
            kept = {name: tensor for name, tensor in found.items() if name.startswith("student.")}
            own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("student.")}
            same = {name: found[name] for name, tensor in own.items() if _shape(found.get(name)) == tensor.shape}
            checkpoint["state_dict"] = kept | own | same

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; raise a `UserError` in one sentence if they are not this module's."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            own = self.state_dict()
            strange = sorted(
                name for name in {*own, *state_dict} if _shape(own.get(name)) != _shape(state_dict.get(name))
            )
            shown = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
            raise UserError(
                f"ckpt_path: the checkpoint is not of this model, they differ in {shown}; give the configuration "
                "that it was trained with"
            ) from error

    def _add_term(self, name: str, term: Term, key: str, teacher: FeatureSpec | None) -> None:
        """Check, build and register a term; one whose weight is the constant 0 is not built."""
        if term.is_off:
            return
        try:
            term.head.check(self.student.spec, teacher)
            term.head.build(self.student.spec, teacher if teacher is not None else self.student.spec)
        except UserError as error:
            raise error.at(f"{key}.head") from None
        self.terms[name] = term
        self.heads[name] = term.head

    def _require_terms(self) -> None:
        if not self.terms:
            raise UserError(
                "model.task: no term of the loss has a weight; give the task or one of model.heads a weight"
            )

    def _class_counts(self, head: Head) -> Tensor:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
        if not hasattr(data, "class_counts"):
            raise UserError(
                f"{type(head).__name__} needs to know how many training images each class has, but the data have no "
                "class_counts(): give a data module of distill.data"
            )
        return torch.tensor(data.class_counts())

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> tuple[Features, Features | None, Tensor]:
        student, teacher = self.see(batch["image"])
        counted = batch["index"] >= 0
        label = torch.where(counted, batch["label"], UNCOUNTED)
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        metrics.update(student["logits"].float().softmax(dim=1), label)
        self.log_dict(metrics, batch_size=len(label))
        if stage == "test" and self.longtail_metrics is not None:
            self.longtail_metrics.update(student["logits"], label)
        return student, teacher, counted

    def _progress(self, step: int) -> Progress:
        """How far training is after `step` optimiser steps."""
        if self._trainer is None:
            return Progress(step)
        steps = self.trainer.estimated_stepping_batches
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        endless = steps == float("inf")
        return Progress(
            step=step,
            epoch=step / steps_per_epoch,
            steps=None if endless else int(steps),
            epochs=None if endless else steps / steps_per_epoch,
        )

    def _is_shown(self) -> bool:
        """Whether anything reads this step's terms: a logger, or what looks at the end of an epoch or of the run.

        Lightning takes a third of a millisecond for each value, and throws it away on the steps between.
        """
        step = self.global_step + 1
        last = self.trainer.is_last_batch or step == self.trainer.max_steps or self.trainer.should_stop
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's Trainer has it
        return last or step % max(every, 1) == 0

    def _log_terms(self, values: dict[str, Tensor], weights: dict[str, float], batch_size: int) -> None:
        shown: dict[str, Any] = {"train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
        for name, value in values.items():
            raw = value.detach()
            shown[f"train/{name}"] = raw
            shown[f"train/{name}_weight"] = weights[name]
            shown[f"train/{name}_weighted"] = weights[name] * raw
            shown |= {f"train/{name}/{key}": figure for key, figure in self.terms[name].head.diagnostics().items()}
        self.log_dict(shown, batch_size=batch_size)


class DistillationModule(ClassificationModule):
    """A student trained with labels and with the heads' comparisons with a frozen teacher.

    Without a teacher and heads it is a `ClassificationModule`.

    Args:
        teacher: the network that is imitated: always in eval mode, without gradient, in no checkpoint.
        heads: the terms by name, each a head and its weight; `null` or weight 0 takes one off.
        teacher_dtype: the type that the teacher computes in; the trainer's precision if not given.
        compile: what `torch.compile` makes faster: the `student`'s passes, the `teacher`'s, or `both`. The heads are
            not compiled, and checkpoints stay as they are.
        training: what a `ClassificationModule` takes.

    Raises:
        UserError: a network cannot be made, or a head does not fit the networks.
    """

    def __init__(
        self,
        *,
        teacher: Network | None = None,
        heads: dict[str, Term | None] | None = None,
        teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        compile: Compiled = "none",
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.teacher: FrozenTeacher | None = None
        if teacher is not None:
            network = _built(teacher, "model.teacher", self.num_classes, self.image_shape)
            self.teacher = FrozenTeacher(network, getattr(torch, teacher_dtype) if teacher_dtype else None)
        spec = self.teacher.spec if self.teacher is not None else None
        for name, term in (heads or {}).items():
            if name in _TAKEN or "." in name or hasattr(nn.ModuleDict, name):
                raise UserError(f"model.heads: a term cannot be called {name!r}, choose another name")
            if term is not None:
                self._add_term(name, term, f"model.heads.{name}", spec)
        self._require_terms()
        self._compile(compile)
        if spec is not None and spec.logits == self.student.spec.logits:
            self.val_teacher_metrics = teacher_metrics("val")
            self.test_teacher_metrics = teacher_metrics("test")

    def see(self, image: Tensor) -> tuple[Features, Features | None]:
        """What the student and the teacher see of images `[B, C, H, W]`."""
        return self.student(image), None if self.teacher is None else self.teacher(image)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which teacher the student was trained with; its weights stay out."""
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["distill"]["teacher"] = [self.teacher.name, self.teacher.fingerprint]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on training with another teacher."""
        super().on_load_checkpoint(checkpoint)
        before = checkpoint.get("distill", {}).get("teacher")
        if before is None or self.teacher is None or self._trainer is None or self.trainer.state.fn != "fit":
            return
        name, fingerprint = before
        if fingerprint != self.teacher.fingerprint:
            raise UserError(
                f"model.teacher: the checkpoint was trained with {name} (weights {fingerprint[:12]}), given is "
                f"{self.teacher.name} (weights {self.teacher.fingerprint[:12]}): resume with the same teacher"
            )

    def _compile(self, which: Compiled) -> None:
        """Compile in place, so that no key of a checkpoint changes; torch does it at the first pass."""
        if which in ("student", "both"):
            self.student.compile()
        if which in ("teacher", "both"):
            if self.teacher is None:
                raise UserError(f"model.compile is {which!r}, but model.teacher is not given")
            self.teacher.network.compile()

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> tuple[Features, Features | None, Tensor]:
        student, teacher, counted = super()._evaluate(batch, stage)
        if teacher is not None and hasattr(self, "val_teacher_metrics"):
            metrics = self.val_teacher_metrics if stage == "val" else self.test_teacher_metrics
            metrics.update(student["logits"], teacher["logits"], counted)
            self.log_dict(metrics, batch_size=len(counted))
        return student, teacher, counted


def _built(network: Network, key: str, num_classes: int, image_shape: tuple[int, int, int]) -> Network:
    try:
        network.build(num_classes, image_shape)
    except UserError as error:
        raise error.at(key) from None
    return network


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
