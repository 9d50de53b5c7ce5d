"""A linear probe: nothing learns but the classifier."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from distill.errors import UserError
from distill.training.classification import ClassificationModule


class FrozenBackbone(Callback):
    """Trains the student's classifier alone: a linear probe of the rest.

    The rest is always in eval mode and without gradient, so that neither its weights nor the statistics of its
    BatchNorms change, and no dropout or stochastic depth is drawn. Give the student the `weights` of the network to be
    probed and `drop_classifier: true`, for a new classifier; checkpoints, tests and exports are those of any student.

    Raises:
        UserError: the student has no classifier that could be told from its backbone.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze the backbone before the optimizer is made."""
        if stage != "fit":
            return
        assert isinstance(pl_module, ClassificationModule)
        student = pl_module.student
        student.requires_grad_(False)
        for layer in student.classifier:
            student.model.get_submodule(layer).requires_grad_(True)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UserError(f"trainer.callbacks: FrozenBackbone finds no linear classifier in {student.name}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the student in eval mode, whatever ran before."""
        assert isinstance(pl_module, ClassificationModule)
        pl_module.student.eval()
