"""LightningModule for distillation from a frozen teacher."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Features
from distill.heads import Batch
from distill.metrics import teacher_metrics
from distill.networks import FrozenTeacher, Network
from distill.objective import TASK, Distiller, Objective, Term
from distill.training.classification import ClassificationModule, build
from distill.training.lightning_internals import trainer_of

Compiled = Literal["none", "student", "teacher", "both"]


class DistillationModule(ClassificationModule):
    """Module that trains a student with labels and with heads that compare it with a frozen teacher.

    Without a teacher and heads, it is a `ClassificationModule`.

    Args:
        teacher: the teacher network: always in eval mode, without gradient, in no checkpoint.
        heads: terms by name, each a head with its weight; `null` or weight 0 removes a term.
        teacher_dtype: dtype that the teacher computes in; defaults to the trainer's precision.
        compile: networks to compile with `torch.compile`: `student`, `teacher` or `both`. Heads are not compiled, and
            the names in checkpoints stay the same.
        training: arguments of `ClassificationModule`.

    Raises:
        UserError: a network cannot be built, or a head does not fit the networks.
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
        self._teacher_network = [teacher]  # in a list, as nn.Module accepts no submodules before its __init__
        self._teacher_dtype = teacher_dtype
        self._heads = heads or {}
        super().__init__(**training)
        self._compile(compile)
        teacher_spec = None if self.teacher is None else self.teacher.spec
        if teacher_spec is not None and teacher_spec.logits == self.student.spec.logits:
            self.val_teacher_metrics = teacher_metrics("val")
            self.test_teacher_metrics = teacher_metrics("test")

    def make_distiller(self, student: Network, terms: dict[str, Term | None]) -> Distiller:
        """Combine the student, the teacher and the objective of the task and the heads."""
        teacher = None
        if (network := self._teacher_network.pop()) is not None:
            build(network, "model.teacher", self.num_classes, self.image_shape)
            teacher = FrozenTeacher(network, getattr(torch, self._teacher_dtype) if self._teacher_dtype else None)
        if TASK in self._heads:
            raise UserError(f"model.heads: a term cannot be called {TASK!r}; choose another name")
        spec = None if teacher is None else teacher.spec
        return Distiller(student, teacher, Objective({**terms, **self._heads}, student.spec, spec))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teacher's name and fingerprint, but not its weights."""
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["distill"]["teacher"] = [self.teacher.name, self.teacher.fingerprint]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume training with another teacher.

        Raises:
            UserError: the teacher's weights differ from those of the checkpoint's teacher.
        """
        super().on_load_checkpoint(checkpoint)
        saved_teacher = checkpoint.get("distill", {}).get("teacher")
        if saved_teacher is None or self.teacher is None or trainer_of(self) is None or self.trainer.state.fn != "fit":
            return
        name, fingerprint = saved_teacher
        if fingerprint != self.teacher.fingerprint:
            raise UserError(
                f"model.teacher: the checkpoint was trained with {name} (weights {fingerprint[:12]}), given "
                f"{self.teacher.name} (weights {self.teacher.fingerprint[:12]}): resume with the same teacher"
            )

    def _compile(self, which: Compiled) -> None:
        """Compile in place, so that the names in checkpoints stay the same; compilation runs in the first pass."""
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
