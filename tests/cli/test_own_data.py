"""Data modules of users and images without labels, from the command line."""

from __future__ import annotations

import csv
import signal

import pytest
import torch
import yaml

from distill.__main__ import main
from tests.program import in_a_process

DATA = ["--data=tests.own_data.OwnData", "--model.image_shape=[3,32,32]"]
LABELS = ["--model.num_classes=10"]
NONE = ["--data.labels=false", "--model.num_classes=0"]
TENS = "--data.batch_size=10"
NETWORKS = [
    *(
        "--model.student=Timm",
        "--model.student.name=test_vit",
        "--model.teacher=Timm",
        "--model.teacher.name=test_vit2",
    ),
    *("--model.heads.rkd.head=RKD", "--model.optimizer=SGD", "--model.optimizer.lr=0.05"),
]
TRAINER = [
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


def curves(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "options", [pytest.param(LABELS, id="labels", marks=pytest.mark.slow), pytest.param(NONE, id="no labels")]
)
def test_a_data_module_of_a_user_trains_is_checked_exported_and_resumed(options, tmp_path, capsys):
    run = tmp_path / "run"
    command = [*DATA, *options, *NETWORKS, *TRAINER]
    assert main(["check", *command]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("label int64" in shown) == (options is LABELS)
    assert "images from" in shown
    assert main(["fit", *command, f"--trainer.default_root_dir={run}"]) == 0
    rows = curves(run)
    assert sum(bool(row["train/loss"]) for row in rows) == 3 * 6
    assert ("val/top1" in rows[0]) == (options is LABELS)
    assert all(0 <= float(row["val/neighbor_agreement"]) <= 1 for row in rows if row["val/neighbor_agreement"])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["model"]["task"] is None) == (options is NONE)
    assert main(["fit", *command, f"--trainer.default_root_dir={run}", "--resume", "--trainer.max_epochs=4"]) == 0
    assert sum(bool(row["train/loss"]) for row in curves(run)) == 4 * 6
    assert main(["validate", *command, f"--ckpt_path={run}/checkpoints/best.ckpt"]) == 0
    output = tmp_path / "student.safetensors"
    capsys.readouterr()
    assert main(["export", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--output={output}"]) == 0
    code = capsys.readouterr().out
    names: dict[str, torch.Tensor] = {"image": torch.rand(2, 3, 32, 32)}
    exec(code, names)
    assert names["logits" if options is LABELS else "embedding"].shape == (2, 10 if options is LABELS else 64)
    assert main(["probe", f"--ckpt_path={run}/checkpoints/last.ckpt", "--data=Digits"]) == 0


@pytest.mark.parametrize(
    ("data", "options", "rows"),
    [
        ("OwnStream", [], {"train images": "?", "steps per epoch": None}),
        ("OwnSeveral", ["--data.kind=dict"], {"train images": "?", "steps per epoch": "6"}),
        *(
            pytest.param(data, options, rows, marks=pytest.mark.slow)
            for data, options, rows in (
                ("OwnSeveral", [], {"train images": "?", "steps per epoch": "6"}),
                ("OwnStream", ["--trainer.limit_train_batches=4"], {"steps per epoch": "4"}),
                ("OwnRest", [TENS], {"last batch of an epoch": "8 images x 1 devices", "steps per epoch": "5"}),
                ("OwnRest", [TENS, "--trainer.limit_train_batches=4"], {"last batch of an epoch": None}),
                (
                    "OwnData",
                    [TENS, "--trainer.accumulate_grad_batches=3"],
                    {"train images": "48", "last batch of an epoch": None, "steps per epoch": "2"},
                ),
            )
        ),
    ],
)
def test_check_shows_the_steps_of_whatever_data_fit_trains_on(data, options, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [f"--data=tests.own_data.{data}", DATA[1], *LABELS, *NETWORKS, *TRAINER, *options]
    assert main(["check", *command]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    shown = {cells[0].strip(): cells[1].strip() for line in printed.splitlines() if (cells := line.split("│")[1:3])}
    assert {name: shown.get(name) for name in rows} == rows
    assert "effective batch" in shown
    assert main(["fit", *command, "--trainer.max_epochs=1"]) == 0
    steps = torch.load("runs/run-1/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert str(steps) == shown.get("steps per epoch", "6")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            [],
            "model.num_classes: OwnData has no attribute num_classes: give the number of classes, 0 for images without",
        ),
        ([*NONE, "--model.task.weight=1.0"], "model.task.head: CrossEntropy needs labels, but the images have none"),
        ([*NONE, "--model.task.head=CrossEntropy"], "model.task.head: CrossEntropy needs labels, but the images have"),
        ([*NONE, "--model.heads.kd.head=KD"], "model.heads.kd.head: KD needs 'logits' of the student, but the network"),
        ([*NONE, "--checkpoint.monitor=val/top1"], "checkpoint.monitor cannot be 'val/top1', which is not logged"),
        ([*LABELS, "--data.labels=false"], "model.task.head: CrossEntropy needs label: the batches hold none"),
        ([*LABELS, "--model.batch={image: pixels}"], "model.batch: image is to be 'pixels', but the data yield a list"),
        ([*LABELS, "--model.image_shape=[3,16,16]"], "model.image_shape is 3 x 16 x 16, but the data yield images of"),
    ],
)
def test_what_does_not_fit_is_refused_before_step_0_and_nothing_is_written(options, sentence, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["fit", *DATA, *NETWORKS, *TRAINER, *options, f"--trainer.default_root_dir={folder}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [LABELS, NONE], ids=["labels", "no labels"])
def test_a_killed_run_on_data_of_a_user_equals_one_never_killed(options, tmp_path):
    states = []
    for name in ("whole", "killed"):
        marker = tmp_path / f"{name}.killed"
        kill = ["--trainer.callbacks=tests.own_data.KillOnce", "--trainer.callbacks.step=8"]
        command = ["fit", *DATA, *options, *NETWORKS, *TRAINER, *kill, f"--trainer.callbacks.file={tmp_path}/marker"]
        command += ["--resume", f"--trainer.default_root_dir={tmp_path}/{name}"]
        marker = tmp_path / "marker"
        if name == "whole":
            marker.touch()
        else:
            marker.unlink()
            assert in_a_process(*command, cwd=tmp_path).returncode == -signal.SIGKILL
        process = in_a_process(*command, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert curves(tmp_path / "whole") == curves(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("options", [LABELS, NONE], ids=["labels", "no labels"])
def test_two_ranks_on_data_of_a_user_train_the_student_of_one_process(options, tmp_path):
    """The order is the user's sampler's: the one that Lightning puts in on several ranks shuffles always."""
    data = ["--data=tests.own_data.OwnSampler", DATA[1], "--trainer.use_distributed_sampler=false"]
    states, figures = [], []
    for name, extra in (("one", ["8"]), ("two", ["4", "--trainer.devices=2", "--trainer.strategy=ddp"])):
        folder = tmp_path / name
        command = ["fit", *data, *options, *NETWORKS, *TRAINER, f"--data.batch_size={extra[0]}", *extra[1:]]
        process = in_a_process(*command, f"--trainer.default_root_dir={folder}", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        states.append(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
        figures.append(
            [float(row["val/neighbor_agreement"]) for row in curves(folder) if row["val/neighbor_agreement"]]
        )
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-3, atol=2e-5, msg=key)
    assert figures[1] == pytest.approx(figures[0], abs=0.01)
