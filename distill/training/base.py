"""The networks, terms and batches of a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from distill.data import Names
from distill.distiller import Distiller
from distill.errors import under
from distill.features import Features
from distill.heads import Batch
from distill.networks import FrozenTeacher, Network, Teacher
from distill.objective import TEACHER, Term
from distill.schedules import Progress
from distill.training.batches import converted
from distill.training.lightning_internals import trainer_of
from distill.training.run_info import progress_of


class DistillerModule(LightningModule):
    """Base of the modules that train a `Distiller` with the batches of any loader.

    Attributes:
        distiller: student, teachers and objective.
        image_shape: `(C, H, W)` of the images.
        batch_names: names of the entries of a batch, see `as_batch`.
    """

    distiller: Distiller
    image_shape: tuple[int, int, int]
    batch_names: Names | None = None

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
        """Compute the logits `[B, K]`, or without a classifier the embedding, of images `[B, C, H, W]` in [0, 1]."""
        output: Tensor = self.student(image)[self.student.output_feature]
        return output

    def extract_features(self, batch: Batch) -> tuple[Features, dict[str, Features]]:
        """Compute the student's features of a batch, and those of every teacher by name."""
        return self.distiller.student_features(batch), self.distiller.teacher_features(batch, self.distiller.teachers)

    def _apply_batch_transfer_handler(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Turn what a loader yields, after everyone's transfer hooks, into the batch that all callbacks get."""
        batch = super()._apply_batch_transfer_handler(batch, *args, **kwargs)
        return converted(batch, self.batch_names, trainer_of(self))

    def _progress(self) -> Progress:
        """Return the progress of the training; outside of one, that of its first step."""
        trainer = trainer_of(self)
        in_training = trainer is not None and trainer.state.fn == "fit"
        return progress_of(trainer, self.global_step) if trainer is not None and in_training else Progress()


def build(network: Network, key: str, num_classes: int, image_shape: tuple[int, int, int], learns: bool = True) -> None:
    """Build a network that learns or teaches; an error in it names the configuration key `key`."""
    with under(key):
        network.build(num_classes, image_shape, learns)
