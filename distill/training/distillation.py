"""LightningModule for distillation from a frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.data import Split
from distill.distiller import Distiller
from distill.errors import UserError, did_you_mean, under
from distill.features import Features
from distill.heads import Batch
from distill.metrics import teacher_metrics
from distill.networks import FeatureSource, FrozenTeacher, Network, Teacher
from distill.objective import TASK, TEACHER, Objective, Term, teacher_key
from distill.randomness import unchanged_states
from distill.store import StoredTeacher
from distill.training.base import build
from distill.training.checks import require_labels
from distill.training.classification import ClassificationModule
from distill.training.comparison import (
    DISTILLATION,
    DistillationMean,
    distillation_is_known,
    distillation_is_scheduled,
    distillation_terms,
    neighbor_metrics,
)
from distill.training.compilation import Compiled, compile_parts
from distill.training.lightning_internals import trainer_of
from distill.training.stored import attach, segment_settings, stored_teachers
from distill.training.verification import verify

Dtype = Literal["float32", "bfloat16", "float16"]


class DistillationModule(ClassificationModule):
    """Module that trains a student with labels and with heads that compare it with one or several frozen teachers.

    Without teachers and heads, it is a `ClassificationModule`.

    Args:
        teacher: the teacher network: always in eval mode, without gradient, in no checkpoint. Or a `StoredTeacher`.
        teachers: further teachers by name: networks, or an `Ensemble` of others; `null` removes one. With several,
            each term names the teacher that it compares with; the one of `teacher` is called "teacher".
        heads: terms by name, each a head with its weight; `null` or weight 0 removes a term.
        teacher_dtype: dtype that the teachers' networks compute in, or a dtype by the teacher's name; defaults to the
            trainer's precision.
        compile: what to compile with `torch.compile`: the network of the `student`, those of the `teacher` (all of
            them), `both`, or `all`, which are the networks that there are and the heads that are pure functions (see
            `Head.is_pure`). The names in checkpoints stay the same.
        training: arguments of `ClassificationModule`.

    Raises:
        UserError: a network cannot be built, or a head does not fit the networks.
    """

    def __init__(
        self,
        *,
        teacher: FeatureSource | None = None,
        teachers: dict[str, FeatureSource | None] | None = None,
        heads: dict[str, Term | None] | None = None,
        teacher_dtype: Dtype | dict[str, Dtype] | None = None,
        compile: Compiled = "none",
        **training: Any,
    ) -> None:
        given = {TEACHER: teacher, **(teachers or {})}
        if teacher is not None and TEACHER in (teachers or {}):
            raise UserError(f"model.teachers: {TEACHER!r} is the name of the one in model.teacher; choose another name")
        # In a list, as nn.Module accepts no submodules before its __init__.
        self._given_teachers = [{name: each for name, each in given.items() if each is not None}]
        self._teacher_dtype = teacher_dtype
        self._heads = heads or {}
        super().__init__(**training)
        compile_parts(self.distiller, compile)
        self.teacher_metrics = nn.ModuleDict()
        for name, each in self.teachers.items():
            if each.spec.logits is not None and each.spec.logits == self.student.spec.logits:
                group = "" if list(self.teachers) == [TEACHER] else f"/{name}"
                stages = [stage for stage in ("val", "test") if each.gives("logits", stage)]
                self.teacher_metrics[name] = nn.ModuleDict(
                    {stage: teacher_metrics(f"{stage}{group}") for stage in stages}
                )
        self.neighbor_metrics = nn.ModuleDict(
            {stage: nn.ModuleDict(neighbor_metrics(self.distiller, stage)) for stage in ("val", "test")}
        )
        self.distillation_mean = DistillationMean() if distillation_is_known(self.distiller, "val") else None

    def make_distiller(self, student: Network, terms: dict[str, Term | None]) -> Distiller:
        """Combine the student, the teachers and the objective of the task and the heads."""
        teachers = self._build_teachers(self._given_teachers.pop())
        if TASK in self._heads:
            raise UserError(f"model.heads: a term cannot be called {TASK!r}; choose another name")
        specs = {name: teacher.spec for name, teacher in teachers.items()}
        require_labels({**terms, **self._heads}, self.num_classes)
        return Distiller(student, teachers, Objective({**terms, **self._heads}, student.spec, specs))

    @property
    def monitor(self) -> tuple[str, Literal["max", "min"]]:
        """The metric of a validation that tells the best checkpoint, and whether the largest or smallest is best."""
        neighbors: Any = self.neighbor_metrics["val"]
        if self.val_metrics is None and len(neighbors):
            return str(next(iter(next(iter(neighbors.values())).keys()))), "max"
        if self.val_metrics is None and self.distillation_mean is not None:
            return f"val/{DISTILLATION}", "min"
        return super().monitor

    def _build_teachers(self, given: dict[str, Any]) -> dict[str, Teacher]:
        """Build the teachers, members of an ensemble before it, and return them in the given order."""
        dtypes = self._dtypes(given)
        built: dict[str, Teacher] = {}

        def make(name: str, ensembles: tuple[str, ...] = ()) -> None:
            if name in built or name not in given:  # an ensemble itself names the member that it lacks
                return
            teacher = given[name]
            if name in ensembles:
                raise UserError(
                    f"{teacher_key(name)}: an ensemble cannot average itself: {' of '.join([*ensembles, name])}"
                )
            for member in getattr(teacher, "of", ()):
                make(member, (*ensembles, name))
                if isinstance(built.get(member), StoredTeacher):
                    raise UserError(f"{teacher_key(name)}: {member!r} is stored: store the ensemble instead")
            if isinstance(teacher, Network):
                build(teacher, teacher_key(name), self.num_classes, self.image_shape, learns=False)
                teacher = FrozenTeacher(teacher, dtypes[name])
            else:
                with under(teacher_key(name)):
                    teacher.build(built)
            built[name] = teacher

        with unchanged_states():  # so that training has the same random numbers where the teachers are stored
            for name in given:
                if "." in name or hasattr(nn.ModuleDict, name):
                    raise UserError(f"model.teachers: a teacher cannot be called {name!r}; choose another name")
                make(name)
        return {name: built[name] for name in given}

    def _dtypes(self, given: Mapping[str, Any]) -> dict[str, torch.dtype | None]:
        """Return the dtype of each teacher that is a network; `None` follows the trainer's precision."""
        networks = [name for name, teacher in given.items() if isinstance(teacher, Network)]
        names = self._teacher_dtype
        if isinstance(names, str) and not networks and given:
            raise UserError(f"model.teacher_dtype is {names!r}, but a stored teacher has the dtype of its store")
        by_name = names if isinstance(names, dict) else dict.fromkeys(networks, names)
        for name in by_name:
            if name not in networks:
                fitting = did_you_mean(name, networks)
                if isinstance(given.get(name), StoredTeacher):
                    fitting = "a stored teacher has the dtype with which it was stored"
                elif name in given:
                    fitting = "an ensemble computes nothing: name its members"
                raise UserError(f"model.teacher_dtype: there is no network {name!r}: {fitting}")
        return {name: getattr(torch, dtype) if (dtype := by_name.get(name)) else None for name in networks}

    def setup(self, stage: str) -> None:
        """Prepare the module, and let the data bring the rows of stored teachers."""
        if stored_teachers(self.distiller):
            splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's Trainer has it
            attach(self.distiller, data, splits.get(stage, ("test",)), segment_settings(self.trainer))
            for name, teacher in stored_teachers(self.distiller).items():
                if stage == "fit" and teacher.verify:
                    with under(teacher_key(name)):
                        verify(teacher, self.distiller, data, self.num_classes)
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teachers' names and fingerprints, but not their weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["distill"]["teachers"] = {
            name: [teacher.name, teacher.fingerprint] for name, teacher in self.teachers.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume training with another teacher.

        Raises:
            UserError: a teacher's weights differ from those of the checkpoint's teacher of that name.
        """
        super().on_load_checkpoint(checkpoint)
        if trainer_of(self) is None or self.trainer.state.fn != "fit":
            return
        for name, (network, fingerprint) in checkpoint.get("distill", {}).get("teachers", {}).items():
            teacher = self.teachers.get(name)
            if teacher is not None and fingerprint != teacher.fingerprint:
                raise UserError(
                    f"{teacher_key(name)}: the checkpoint was trained with {network} (weights {fingerprint[:12]}), "
                    f"given {teacher.name} (weights {teacher.fingerprint[:12]}): resume with the same teacher"
                )

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> tuple[Features, Tensor]:
        student, counted = super()._evaluate(batch, stage)
        metrics: Any = self.teacher_metrics
        neighbors: Any = self.neighbor_metrics[stage]
        objective = self.distiller.objective
        is_compared = stage == "val" and self.distillation_mean is not None
        if self.trainer.state.fn != "fit" and distillation_is_scheduled(objective):
            is_compared = False  # at no step of a training
        compared = [objective.teacher_of(name) for name in distillation_terms(objective)] if is_compared else []
        given_here = [name for name, stages in metrics.items() if stage in stages]
        read = dict.fromkeys([*given_here, *neighbors, *(name for name in compared if name is not None)])
        teachers = self.distiller.teacher_features(batch, read)
        for name, collection in neighbors.items():
            collection.update(student["embedding"], teachers[name]["embedding"], counted)
            self.log_dict(collection, batch_size=len(counted))
        if compared and self.distillation_mean is not None:
            self.distillation_mean.add(objective, student, teachers, batch, counted, self._progress())
            self.log(f"val/{DISTILLATION}", self.distillation_mean, batch_size=len(counted))
        for name in given_here:
            metrics[name][stage].update(student["logits"], teachers[name]["logits"], counted)
            self.log_dict(metrics[name][stage], batch_size=len(counted))
        return student, counted
