"""`~` is the user's home in every path, whether a configuration file or the command line gives it."""

import os

import pytest
from jsonargparse import Namespace

from distill.__main__ import main
from distill.cli.paths import expand_user
from distill.cli.program import run
from tests.program import TINY


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home


def test_every_string_of_a_configuration_is_expanded(home):
    nested = Namespace(a="~/x", b=[Namespace(root="~"), {"file": "~/y", "name": "a~b"}, 3, None])
    expected = Namespace(a=f"{home}/x", b=[Namespace(root=str(home)), {"file": f"{home}/y", "name": "a~b"}, 3, None])
    assert expand_user(nested) == expected


@pytest.mark.slow
def test_a_run_below_home_is_in_one_folder_and_found_there_by_every_command(home, capsys):
    (home / "weights.yaml").write_text("trainer: {default_root_dir: ~/runs/a}\ncheckpoint: {dirpath: ~/kept}\n")
    assert main(["fit", *TINY, "--config=~/weights.yaml"]) == 0
    assert sorted(os.listdir(home / "runs/a")) == ["config.yaml", "metrics.csv", "results.json"]
    assert sorted(os.listdir(home / "kept")) == ["best.ckpt", "last.ckpt"]
    last = "--ckpt_path=~/kept/last.ckpt"
    weights = ["--model.student.weights=~/kept/best.ckpt"]
    assert run(["check", *TINY, *weights]).model is not None
    assert main(["test", *TINY, last]) == 0
    assert main(["export", last, "--output=~/student.safetensors"]) == 0
    assert (home / "student.safetensors").is_file()
    callback = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=~/theirs"]
    assert main(["fit", *TINY, last, *callback, "--trainer.max_epochs=2", "--trainer.default_root_dir=~/b"]) == 0
    assert os.listdir(home / "theirs")
    assert main(["fit", *TINY, "--data=ImageFolder", "--data.root=~/no_images"]) == 2
    assert f"{home}/no_images" in capsys.readouterr().err
    assert os.listdir(home / "work") == []
