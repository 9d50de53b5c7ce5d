"""The kNN probe during training."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from distill.callbacks import KNNProbe
from distill.data import Digits
from distill.errors import UserError
from distill.heads.rkd import RKD
from distill.knn import probe
from distill.networks import Timm
from distill.objective import Term
from distill.training.distillation import DistillationModule
from tests.own_data import OwnData, SameImages


class Figures(Callback):
    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        self.found.append(trainer.callback_metrics.get("val/knn_top1"))


def fit(data, callback, epochs=1, classes=0):
    torch.manual_seed(0)
    module = DistillationModule(
        student=Timm("test_vit"),
        teacher=Timm("test_vit2"),
        heads={"rkd": Term(RKD())},
        optimizer=partial(torch.optim.SGD, lr=0.05),
        num_classes=classes,
        image_shape=(3, 32, 32),
    )
    figures = Figures()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[callback, figures] if callback else [figures],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module, figures.found


def test_the_probe_logs_the_accuracy_of_distill_probe_and_changes_nothing():
    labeled = Digits(image_size=32)
    module, (none, figure) = fit(SameImages(labels=False, batch_size=8), KNNProbe(2, data=labeled), epochs=2)
    plain = Digits(image_size=32, augment=False)
    assert none is None
    assert float(figure) == pytest.approx(probe(module.student, plain, queries="val").top1)
    assert labeled.augment, "the data of the user stay as they are"
    alone, _ = fit(SameImages(labels=False, batch_size=8), None, epochs=2)
    for name, tensor in alone.state_dict().items():
        if "student" in name:
            assert torch.equal(tensor, module.state_dict()[name]), name


@pytest.mark.parametrize("data", [SameImages(labels=False, batch_size=8), OwnData()])
def test_a_probe_without_labels_is_refused(data):
    with pytest.raises(UserError, match="KNNProbe needs a data module of distill with labels"):
        fit(data, KNNProbe())
