"""Training with data modules of users, with and without labels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from distill.callbacks import GradientShares, RunCheckpoint, SuperpixelSegments
from distill.errors import UserError
from distill.heads.crd import CRD
from distill.heads.cross_entropy import CrossEntropy
from distill.heads.dkd import DKD
from distill.heads.kd import KD
from distill.heads.rkd import RKD
from distill.heads.rrd import RRD
from distill.heads.serkd import SeRKD
from distill.heads.sp import SP
from distill.heads.trg import TRG
from distill.networks import Timm
from distill.objective import Term
from distill.schedules import Warmup
from distill.training.distillation import DistillationModule
from tests.own_data import OwnData, OwnOnDevice, Pairs, SameImages, images_of


def module(classes=10, heads=None, **settings):
    torch.manual_seed(0)
    heads = {"rkd": Term(RKD(scope="batch")), "rrd": Term(RRD(size=16, width=8))} if heads is None else heads
    networks = {"student": Timm("test_vit"), "teacher": Timm("test_vit2")}
    defaults = {"optimizer": partial(torch.optim.SGD, lr=0.05), "num_classes": classes, "image_shape": (3, 32, 32)}
    return DistillationModule(**{**networks, **defaults, "heads": heads, **settings})


class Losses(Callback):
    """Records what every callback sees, and the loss of each step."""

    def __init__(self):
        self.values, self.keys = [], set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.keys.add(frozenset(batch))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = (
        lambda self, trainer, pl_module, batch, batch_idx, dataloader_idx=0: self.keys.add(frozenset(batch))
    )


def fit(model, data: Any, epochs=1, callbacks=(), **settings: Any):
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[losses, *callbacks],
        **{
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, RunCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )
    trainer.fit(model, data)
    return losses, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("labels", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_same_images_through_any_data_module_give_the_same_losses_over_three_epochs(labels):
    results = [
        fit(module(10 * labels), data, epochs=3)
        for data in (SameImages(labels, batch_size=8), OwnData(labels), OwnData(labels, kind="dict"))
    ]
    (expected, metrics), *rest = results
    assert len(expected.values) == 3 * 6
    assert ("val/top1" in metrics) == labels
    assert "val/neighbor_agreement" in metrics
    for losses, own_metrics in rest:
        assert losses.values == expected.values
        assert own_metrics == metrics


def test_every_callback_gets_the_dict_and_transfer_hooks_of_a_user_get_their_own_batch():
    losses, metrics = fit(module(), OwnOnDevice())
    assert losses.keys == {frozenset({"image", "label"})}
    plain, _ = fit(module(), OwnData())
    assert losses.values == pytest.approx(plain.values, rel=0.05), "of images with 8 bits"
    assert "val/top1" in metrics


def test_segments_are_added_to_the_batches_of_a_user():
    model = module(heads={"serkd": Term(SeRKD(superpixels="segments", count=16))})
    losses, metrics = fit(model, OwnData(), callbacks=[SuperpixelSegments(16)], limit_train_batches=2)
    assert len(losses.values) == 2
    assert metrics["val/distillation"] > 0


def test_segments_of_normalized_images_are_those_of_the_images_before(tmp_path):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    image, _ = images_of("val", 2)
    normalized = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = []
    for callback, images in ((SuperpixelSegments(9), image), (SuperpixelSegments(9, mean=mean, std=std), normalized)):
        batch = {"image": images}
        callback._add(batch)
        assert batch["image"] is images
        found.append(batch["segments"])
    assert (found[0] == found[1]).float().mean() > 0.99


def test_predictions_come_with_an_index_where_there_is_one_and_without_a_classifier_are_embeddings():
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loader = DataLoader(Pairs("val", True, "index"), batch_size=10)
    first, _ = trainer.predict(module(), loader)
    assert first["index"].tolist() == list(range(10))
    assert first["probability"].shape == (10, 10)
    first, _ = trainer.predict(module(0), DataLoader(Pairs("val", False), batch_size=10))
    assert set(first) == {"embedding"}
    assert first["embedding"].shape == (10, 64)


@pytest.mark.parametrize(
    ("heads", "data", "sentence"),
    [
        ({"crd": Term(CRD(48, 8, 8))}, OwnData(), "model.heads.crd.head: CRD needs index: give each image's place"),
        (
            {"dkd": Term(DKD())},
            OwnData(labels=False),
            "model.task.head: CrossEntropy needs label: the batches hold none",
        ),
        ({"s": Term(SeRKD(superpixels="segments"))}, OwnData(), "model.heads.s.head: SeRKD needs segments: add the"),
    ],
)
def test_a_head_that_needs_what_the_batches_lack_says_so_before_step_0(heads, data, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(module(heads=heads), data)


def test_labels_are_refused_by_name_where_images_have_none():
    for settings in ({"task": Term(CrossEntropy())}, {"heads": {"dkd": Term(DKD())}}):
        with pytest.raises(
            UserError, match=r"model\.(task|heads\.dkd)\.head: \w+ needs labels, but the images have none"
        ):
            module(0, **settings)
    with pytest.raises(UserError, match="KD needs 'logits' of the student"):
        module(0, heads={"kd": Term(KD())})
    assert set(
        module(
            0,
            heads={"kd": Term(KD())},
            student=Timm("test_vit", num_classes=7),
            teacher=Timm("test_vit2", num_classes=7),
        ).terms
    ) == {"kd"}
    assert set(module(10, task=None).terms) == {"rkd", "rrd"}
    assert set(module(10, student=Timm("test_vit", num_classes=0)).terms) == {"rkd", "rrd"}


def test_crd_reads_the_index_of_a_tuple_and_needs_no_labels():
    losses, _ = fit(module(heads={"crd": Term(CRD(48, 8, 8))}), OwnData(kind="index"))
    assert losses.keys == {frozenset({"image", "label", "index"})}
    head = CRD(48, 8, 8, positives="class")
    assert head.batch_needs == {"index", "label"}


class Stream(IterableDataset):
    """Images of which nobody knows the number."""

    def __iter__(self):
        yield from zip(*images_of("train"), strict=True)


def test_a_stream_trains_and_what_it_lacks_is_told_at_its_first_batch():
    losses, _ = fit(module(), DataLoader(Stream(), batch_size=8))
    assert len(losses.values) == 6
    with pytest.raises(UserError, match="CRD needs 'index', but a batch has image, label"):
        fit(module(heads={"crd": Term(CRD(48, 8, 8))}), DataLoader(Stream(), batch_size=8))


def test_the_look_before_step_0_moves_neither_the_loader_nor_a_random_state(monkeypatch):
    class Noisy(Pairs):
        reads = 0

        def __getitem__(self, index):
            type(self).reads += 1
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    def losses():
        model = module()
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(5)
        return fit(model, DataLoader(Noisy("train", True), batch_size=8, shuffle=True, generator=generator))[0].values

    expected, reads = losses(), Noisy.reads
    monkeypatch.setattr("distill.training.batches.sample_batch", lambda *_: None)
    Noisy.reads = 0
    assert losses() == expected
    assert Noisy.reads == reads - 2


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_another_shape_or_range_are_noticed_before_step_0(workers):
    with pytest.raises(UserError, match="model.image_shape is 3 x 48 x 48, but the data yield images of 3 x 32 x 32"):
        fit(module(image_shape=(3, 48, 48)), DataLoader(Pairs("train", True), batch_size=8, num_workers=workers))

    class Normalized(Pairs):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image - 0.5) / 0.25, label

    with pytest.warns(UserWarning, match="the networks normalize images in \\[0, 1\\] by themselves"):
        fit(module(), DataLoader(Normalized("train", True), batch_size=8), max_steps=1)


def test_number_of_classes_and_shape_come_from_the_data_or_the_configuration():
    told = module(None, image_shape=None, data=SameImages())
    assert (told.num_classes, told.image_shape) == (10, (3, 32, 32))
    with pytest.raises(UserError, match="model.num_classes: OwnData has no attribute num_classes: give the number"):
        module(None, data=OwnData())
    with pytest.raises(UserError, match="model.num_classes is 7, but SameImages has 10: leave it out"):
        module(7, data=SameImages())


def test_the_best_checkpoint_is_told_by_the_labels_or_else_by_the_neighbors(tmp_path):
    for labels, monitor in ((True, "val/top1"), (False, "val/neighbor_agreement")):
        checkpoint = RunCheckpoint(str(tmp_path / str(labels)))
        _, metrics = fit(module(10 * labels), OwnData(labels), epochs=2, callbacks=[checkpoint])
        assert checkpoint.monitor == monitor
        assert (tmp_path / str(labels) / "best.ckpt").exists()
        assert float(checkpoint.best_model_score) >= metrics[monitor]


def test_without_validation_images_a_run_trains_and_saves_its_last_state(tmp_path):
    class NoValidation(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Pairs("train", False), batch_size=8)

    fit(module(0), NoValidation(), callbacks=[RunCheckpoint(str(tmp_path))])
    assert (tmp_path / "last.ckpt").exists()


def test_trg_draws_by_the_place_in_the_batch_without_an_index():
    heads = {"trg": Term(TRG(tokens_per_image=2, neighbors=4))}
    first, second = (fit(module(heads=heads), OwnData(labels=True))[0].values for _ in range(2))
    assert first == second


class WithoutTraining(OwnData):
    """A data module of a user that reads the training images only for a training."""

    def setup(self, stage: str) -> None:
        """Read the images of the stage."""
        splits = ("train", "val") if stage == "fit" else ("val",)
        for split in splits:
            setattr(self, split, Pairs(split, self.labels, self.kind))


def validated(model, data):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (figures,) = trainer.validate(model, data, verbose=False)
    return figures


def test_a_validation_reads_no_training_images_and_has_the_distillation_of_the_training():
    heads = {"kd": Term(KD(), 2.0), "rkd": Term(RKD(scope="batch"))}
    model = module(heads=heads)
    _, metrics = fit(model, WithoutTraining(), num_sanity_val_steps=0, limit_train_batches=2)
    figures = validated(model, WithoutTraining())
    assert figures["val/distillation"] == pytest.approx(metrics["val/distillation"])
    loader = DataLoader(Pairs("val", labels=True), batch_size=8)
    assert validated(model, loader)["val/distillation"] == figures["val/distillation"]


def test_a_validation_leaves_out_what_follows_the_progress_of_a_training():
    model = module(heads={"kd": Term(KD(), Warmup(epochs=2))})
    assert "val/distillation" not in validated(model, WithoutTraining())


@pytest.mark.parametrize("callbacks", [[], [GradientShares(every=1)]])
def test_a_run_without_labels_begins_with_terms_of_weight_0(callbacks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a Trainer without a folder writes its pictures
    model = module(classes=0, heads={"rkd": Term(RKD(), Warmup(epochs=1)), "sp": Term(SP(), Warmup(epochs=1))})
    losses, _ = fit(model, OwnData(labels=False), callbacks=callbacks)
    assert losses.values[0] == 0
    assert min(losses.values[1:]) > 0
