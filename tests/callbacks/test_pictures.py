"""Plots of the heads through the real command line."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from distill.__main__ import main
from distill.callbacks import Results
from distill.callbacks.pictures import HeadPictures, pictures_folder
from distill.cli.program import run
from distill.heads import SeRKD
from distill.networks import TorchModule
from distill.objective import Term
from distill.training.distillation import DistillationModule
from tests.program import KD, TEACHER, TINY

HEADS = [*TEACHER, *KD, "--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=32"]


def test_heads_are_plotted_without_an_effect_on_training(tmp_path):
    plotted = run(
        ["fit", *TINY, *HEADS, "--trainer.callbacks=HeadPictures", f"--trainer.default_root_dir={tmp_path}/a"]
    )
    plain = run(["fit", *TINY, *HEADS, f"--trainer.default_root_dir={tmp_path}/b"])
    pictures = list((tmp_path / "a" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["rrd-epoch-0.png"], "RRD implements plot, KD does not"
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(plotted.model.state_dict()[name], tensor), name


DRAWING = [*TEACHER, *KD, "--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=32"]
DRAWING += ["--trainer.callbacks=HeadPictures", "--trainer.callbacks+=GradientShares", "--trainer.callbacks.every=1"]
BOTH = ["gradient_shares.png", "rrd-epoch-0.png"]


def pictures_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


@pytest.mark.parametrize(
    "checkpoints",
    ["--checkpoint.dirpath=ck/one", pytest.param("--trainer.enable_checkpointing=false", marks=pytest.mark.slow)],
)
def test_pictures_are_in_the_folder_of_their_run_wherever_its_checkpoints_are(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(["fit", *TINY, *DRAWING, checkpoints, "--trainer.default_root_dir=one"])
    drawn = pictures_of(tmp_path)
    assert drawn == [f"one/pictures/{file}" for file in BOTH]
    before = [(tmp_path / path).stat().st_mtime_ns for path in drawn]
    run(["fit", *TINY, *DRAWING, checkpoints, "--trainer.default_root_dir=one", "--trainer.fast_dev_run=true"])
    assert pictures_of(tmp_path) == drawn
    assert [(tmp_path / path).stat().st_mtime_ns for path in drawn] == before, "a fast_dev_run draws none"


@pytest.mark.parametrize(
    ("checkpoints", "folder"), [("run/checkpoints", "run/pictures"), ("ck/one", "ck/one/pictures"), (None, "pictures")]
)
def test_pictures_of_a_trainer_without_a_run_are_with_its_checkpoints(checkpoints, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [Results()] + ([ModelCheckpoint(checkpoints)] if checkpoints else [])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=checkpoints is not None, callbacks=callbacks
    )
    assert pictures_folder(trainer).resolve() == tmp_path / folder


def network():
    layers = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return TorchModule(nn.Sequential(*layers, nn.Linear(64, 10)), tokens="0")


def test_a_picture_leaves_frozen_layers_frozen_and_trained_ones_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = DistillationModule(
        student=network(),
        teacher=network(),
        heads={"serkd": Term(SeRKD())},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        num_classes=10,
        image_shape=(3, 16, 16),
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback = HeadPictures()
    module.student.train()
    module.student.model[1].eval()
    callback.on_train_batch_start(trainer, module, {"image": torch.rand(2, 3, 16, 16)}, 0)
    callback.on_train_epoch_end(trainer, module)
    assert [path.name for path in Path("pictures").iterdir()] == ["serkd-epoch-0.png"]
    assert [layer.training for layer in module.student.model] == [True, False, True, True, True, True]
    callback.on_train_batch_start(trainer, module, {"image": torch.rand(2, 5, 16, 16)}, 0)
    with pytest.raises(RuntimeError):
        callback.on_train_epoch_end(trainer, module)
    assert module.student.training, "after an error, too"


SERKD = ["--model.heads.serkd.head=SeRKD", "--model.student.name=test_vit", "--model.student.options={patch_size: 4}"]
VIT = ["--model.teacher=Timm", "--model.teacher.name=test_vit", "--model.teacher.options={patch_size: 8}"]


@pytest.mark.parametrize(
    "superpixels",
    [
        [],
        [
            "--model.heads.serkd.head.superpixels=segments",
            "--model.heads.serkd.head.count=9",
            "--trainer.callbacks=SuperpixelSegments",
            "--trainer.callbacks.segments=9",
        ],
    ],
    ids=["soft", "segments"],
)
def test_superpixels_are_plotted_by_the_plot_command(superpixels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, *SERKD, *VIT, *superpixels]
    assert main(["fit", *settings, "--trainer.default_root_dir=run"]) == 0
    checkpoint = "--ckpt_path=run/checkpoints/last.ckpt"
    assert main(["plot", *settings, checkpoint, "--output=pictures", "--images=2"]) == 0, capsys.readouterr().err
    assert "pictures/serkd.png" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "serkd.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "pictures"}


def test_a_folder_that_cannot_be_made_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("mine")
    assert main(["plot", *TINY, *SERKD, *VIT, "--output=afile/deep", "--images=2"]) == 2
    assert "output: 'afile/deep/serkd.png' cannot be written: Not a directory" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*TEACHER, *KD], "model.heads: none of the heads can plot; those that can are "),
        ([*SERKD, *VIT, "--images=0"], "images must be at least 1, given 0"),
        (["--ckpt_path=nowhere.ckpt", *SERKD, *VIT], "ckpt_path: there is no file 'nowhere.ckpt'"),
    ],
    ids=["no head that plots", "no images", "no checkpoint"],
)
def test_what_cannot_be_plotted_is_reported_in_one_sentence(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *TINY, *args, "--output=pictures"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
