"""The kNN probe during training."""

import json
from copy import deepcopy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from distill.__main__ import main
from distill.callbacks import KNNProbe
from distill.data import ArraySource, Digits
from distill.data.longtail import ExponentialTail
from distill.errors import UserError
from distill.heads.rkd import RKD
from distill.knn import probe
from distill.networks import Timm, TorchModule
from distill.objective import Term
from distill.training.classification import ClassificationModule
from distill.training.distillation import DistillationModule
from tests.own_data import OwnData, SameImages
from tests.program import TINY


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


def test_more_neighbors_than_labels_are_refused_before_training():
    trained = Trained()
    with pytest.raises(UserError, match="KNNProbe.neighbors is 20, more than the 10 labeled training images"):
        fit_convolutions(Digits(labels_per_class=1), KNNProbe(), trained)
    assert not hasattr(trained, "student")


class Trained(Callback):
    """Keeps a copy of the student after the last step."""

    def on_train_epoch_end(self, trainer, pl_module):
        self.student = deepcopy(pl_module.student)


def fit_convolutions(data, *callbacks, val=None, **settings):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)
    module = ClassificationModule(
        TorchModule(nn.Sequential(*layers)), partial(torch.optim.SGD, lr=1.0), data=data, **settings
    )
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **options, **quiet)
    if val is None:
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data.train_dataloader(), val)
    return module, trainer.callback_metrics.get("val/knn_top1")


@pytest.mark.parametrize("choice", ["averaged", "current"])
@pytest.mark.parametrize("first", ["average", pytest.param("probe", marks=pytest.mark.slow)])
def test_the_probed_weights_are_those_that_validation_evaluates(choice, first):
    callbacks = [KNNProbe(neighbors=1), EMAWeightAveraging(decay=0.9)]
    trained = Trained()
    data = Digits(batch_size=32, image_size=8)
    ordered = callbacks if first == "probe" else callbacks[::-1]
    module, figure = fit_convolutions(data, *ordered, trained, evaluation_weights=choice)
    plain = Digits(batch_size=512, image_size=8, augment=False)
    of = {
        name: probe(student, plain, 1, queries="val").top1
        for name, student in (("averaged", module.student), ("current", trained.student))
    }
    assert of["averaged"] != of["current"]
    assert float(figure) == pytest.approx(of[choice])


@pytest.mark.parametrize("setting", [{"longtail": ExponentialTail(0.1)}, {"labels_per_class": 3}])
def test_only_images_and_labels_of_the_run_vote(setting):
    data = Digits(batch_size=16, image_size=8, **setting)
    module, figure = fit_convolutions(data, KNNProbe(neighbors=1))
    seen = data.train_dataloader().dataset.source
    memory = torch.stack([seen[index][0] for index in range(len(seen)) if seen[index][1] >= 0])
    labels = torch.tensor([label for label in seen.labels if label >= 0])
    val = data.used_source("val")
    with torch.no_grad():
        rows, queries = (module.student(images).embedding for images in (memory, val.images))
    nearest = torch.cosine_similarity(queries[:, None], rows, dim=-1).argmax(dim=1)
    assert float(figure) == pytest.approx((labels[nearest] == torch.tensor(val.labels)).double().mean().item())
    assert len(memory) < 1078


class NoBatch(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_validation_without_a_batch_has_no_probe_and_says_so():
    data = Digits(batch_size=16, image_size=8)
    with pytest.warns(UserWarning, match="KNNProbe: the validation had no batch"):
        _, figure = fit_convolutions(data, KNNProbe(data=data), val=DataLoader(NoBatch()))
    assert figure is None


class LabelsOfTraining(Digits):
    """Digits whose validation images have no labels."""

    lists_labels = True

    def samples(self, split):
        samples = super().samples(split)
        if split == "val":
            samples.source = ArraySource(samples.source.images, [-1] * len(samples.source))
            if not self.lists_labels:
                samples.source = [samples.source[index] for index in range(len(samples.source))]
        return samples


def test_validation_images_without_a_label_are_refused_before_training():
    trained = Trained()
    with pytest.raises(UserError, match="none of those of LabelsOfTraining has a label: give others as its data"):
        fit_convolutions(LabelsOfTraining(image_size=8), KNNProbe(), trained)
    assert not hasattr(trained, "student")
    fit_convolutions(LabelsOfTraining(image_size=8), KNNProbe(data=Digits(image_size=8)))


def test_validation_images_without_a_label_are_refused_by_a_probe_if_the_source_lists_none(monkeypatch):
    monkeypatch.setattr(LabelsOfTraining, "lists_labels", False)
    with pytest.raises(UserError, match="data: none of its val images has a label, by which a prediction could be"):
        fit_convolutions(LabelsOfTraining(image_size=8), KNNProbe())


KNN = ["--trainer.callbacks=KNNProbe", "--trainer.callbacks.every_n_epochs=2", "--data.image_size=16"]
BEST = ["--checkpoint.monitor=val/knn_top1"]


def test_results_and_checkpoints_have_a_figure_only_of_epochs_with_a_probe(tmp_path):
    epochs = ["--trainer.max_epochs=3", "--checkpoint.every_n_epochs=2"]
    assert main(["fit", *TINY, *KNN, *BEST, *epochs, f"--trainer.default_root_dir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["last"]["epoch"] == 2
    assert "val/top1" in results["last"]
    assert "val/knn_top1" not in results["last"]
    assert results["best"]["epoch"] == 1
    saved = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert saved["epoch"] == 1
    assert results["best"]["val/knn_top1"] > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            BEST,
            "checkpoint.monitor is 'val/knn_top1', which KNNProbe.every_n_epochs 2 leaves out of some of the "
            "validations: set that to 1, or checkpoint.every_n_epochs to a multiple of it",
        ),
        ([*BEST, "--checkpoint.every_n_epochs=3"], "checkpoint.monitor is 'val/knn_top1', which"),
        ([*BEST, "--checkpoint.every_n_epochs=2", "--trainer.val_check_interval=1"], "checkpoint.monitor is 'val/knn"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/knn_top1"],
            "trainer.callbacks: EarlyStopping.monitor is 'val/knn_top1', which",
        ),
        (
            ["--model.scheduler=ReduceLROnPlateau", "--model.scheduler.monitor=val/knn_top1"],
            "model.scheduler.monitor is 'val/knn_top1', which",
        ),
        ([*BEST, "--trainer.check_val_every_n_epoch=4"], None),
        ([*BEST, "--checkpoint.save_top_k=-1"], None),
    ],
)
def test_a_monitor_of_a_figure_that_is_sometimes_missing_is_refused(options, sentence, tmp_path, capsys):
    code = main(["check", *TINY, *KNN, *options, f"--trainer.default_root_dir={tmp_path}/run"])
    error = capsys.readouterr().err
    assert code == (2 if sentence else 0), error
    assert (sentence or "") in error
