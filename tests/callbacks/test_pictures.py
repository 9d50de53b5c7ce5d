"""Plots of the heads through the real command line."""

import pytest
import torch

from distill.__main__ import main
from distill.cli.program import run
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
