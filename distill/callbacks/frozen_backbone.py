"""Linear probing: training of the classifier on a frozen backbone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from distill.errors import UserError
from distill.training.classification import ClassificationModule


class FrozenBackbone(Callback):
    """Trains only the student's classifier, as a linear probe of its backbone.

    The whole student stays in eval mode and the backbone gets no gradient, so that neither its weights nor its
    BatchNorm statistics change, and dropout and stochastic depth are off. Give the student the `weights` of the
    network to probe and `drop_classifier: true` for a new classifier. The result is checkpointed, tested and exported
    like any student.

    Raises:
        UserError: the student has no linear classifier.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze the backbone before the optimizer is created."""
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
        """Put the student into eval mode, which Lightning may have changed."""
        assert isinstance(pl_module, ClassificationModule)
        pl_module.student.eval()
