"""A run has the requested length, and `last.ckpt` is its last step whatever the monitored metric."""

import json
import shutil

import pytest
import torch
from lightning.pytorch import Trainer

from distill.__main__ import main
from distill.callbacks import RunCheckpoint
from distill.cli.program import run
from distill.runs.named_checkpoints import named_checkpoint
from tests.program import TEACHER, TINY
from tests.runs.test_interrupted import assert_alike
from tests.runs.test_resume import assert_equal_bits, weights

FIT = [
    *("fit", *TINY, *TEACHER, "--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=50"),
    *("--model.student.options={drop_rate: 0.3}", "--trainer.limit_train_batches=3", "--trainer.log_every_n_steps=1"),
]
TEN = [*FIT, "--trainer.max_epochs=-1", "--trainer.max_steps=10", "--checkpoint.every_n_train_steps=1"]
TEN += ["--checkpoint.save_top_k=-1", "--checkpoint.filename={step}", "--resume"]
FOUR = [*FIT, "--trainer.limit_train_batches=1", "--trainer.max_epochs=4"]
FOUR += ["--checkpoint.monitor=epoch", "--checkpoint.mode=min"]
NEVER_BETTER = ["--checkpoint.monitor=epoch", "--checkpoint.mode=min"]  # than after the first epoch


def results(folder):
    return json.loads((folder / "results.json").read_text())


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ten") / "run"
    run([*TEN, f"--trainer.default_root_dir={folder}"])
    return folder


def test_max_steps_beyond_one_epoch_all_run_and_the_last_is_validated_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.max_epochs=-1", "--trainer.max_steps=10"]) == 0
    folder = tmp_path / "runs/run-1"
    found = results(folder)
    assert (found["steps"], found["epochs"], found["last"]["step"]) == (10, 4, 10)
    assert "val/top1" in found["last"]
    assert "validation_step" not in found["last"]
    assert step_of(folder / "checkpoints/last.ckpt") == 10


@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.slow), 7, pytest.param(9, marks=pytest.mark.slow)]
)  # at the end of an epoch; within one; at the end before the last, partial epoch
def test_a_run_of_max_steps_resumed_anywhere_equals_an_uninterrupted_one(ten_steps, step, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ten_steps, folder)
    (folder / "results.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if path.stem == "last" or int(path.stem.removeprefix("step=")) > step:
            path.unlink()
    run([*TEN, f"--trainer.default_root_dir={folder}"])
    assert_alike(folder, ten_steps)


def test_a_run_resumed_from_the_end_of_an_epoch_continues_with_the_next(ten_steps, tmp_path):
    """From `last.ckpt` of the end of an epoch, Lightning itself would start an epoch without batches."""
    folder, command = tmp_path / "run", [*TEN, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    run([*command, "--trainer.max_steps=6"])
    assert step_of(folder / "checkpoints/last.ckpt") == 6
    assert main([*command, "--trainer.max_steps=10"]) == 0
    assert_equal_bits(weights(folder / "checkpoints/last.ckpt"), weights(ten_steps / "checkpoints/last.ckpt"))


def test_a_run_that_ended_within_an_epoch_can_be_extended(ten_steps, tmp_path):
    folder, command = tmp_path / "run", [*TEN, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    run([*command, "--trainer.max_steps=5"])
    assert results(folder)["last"]["step"] == 5
    run(command)
    assert_equal_bits(weights(folder / "checkpoints/last.ckpt"), weights(ten_steps / "checkpoints/last.ckpt"))
    assert results(folder)["steps"] == 10


def test_the_last_checkpoint_is_of_the_last_epoch_even_if_the_metric_never_improves(tmp_path):
    run([*FIT, *NEVER_BETTER, "--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert step_of(tmp_path / "run/checkpoints/last.ckpt") == 9 == results(tmp_path / "run")["last"]["step"]
    assert step_of(tmp_path / "run/checkpoints/best.ckpt") == 3


@pytest.mark.parametrize(
    ("options", "validated"),
    [(["--trainer.check_val_every_n_epoch=2"], 6), (["--trainer.limit_val_batches=0"], None)],
    ids=["validation every second epoch", "no validation"],
)
def test_the_last_checkpoint_is_of_the_last_epoch_even_without_a_final_validation(options, validated, tmp_path):
    run([*FIT, *options, "--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path / 'run'}"])
    last = results(tmp_path / "run")["last"]
    assert step_of(tmp_path / "run/checkpoints/last.ckpt") == 9 == last["step"]
    assert last.get("validation_step") == validated


@pytest.mark.parametrize(
    "interval", ["every_n_train_steps=2", pytest.param("train_time_interval=00:00:00", marks=pytest.mark.slow)]
)
def test_an_interval_saves_before_the_first_validation_and_in_addition_to_epoch_ends(interval, tmp_path):
    log = ["--trainer.callbacks=tests.signals.StepsOfLast", f"--trainer.callbacks.file={tmp_path / 'steps'}"]
    fit = [*FIT, "--trainer.max_epochs=3", f"--checkpoint.{interval}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    run([*fit, *log])
    every = [1, 2, 3, 4, 5, 6, 7, 8] if "time" in interval else [2, 3, 4, 6, 8]
    # step of `last.ckpt` at the start of each step, 0 before the first
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps == [max([0, *(step for step in every if step <= current)]) for current in range(9)]
    assert step_of(tmp_path / "run/checkpoints/last.ckpt") == 9


def test_sigterm_at_the_end_of_an_epoch_loses_no_step(tmp_path):
    fit = [*FIT, *NEVER_BETTER, "--trainer.max_epochs=3", "--resume", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    fit += ["--trainer.callbacks=tests.signals.TermAtEpochEnd", "--trainer.callbacks.step=6"]
    with pytest.raises(SystemExit) as end:
        main(fit)
    assert end.value.code == 143
    assert step_of(tmp_path / "run/checkpoints/last.ckpt") == 6
    assert main(fit) == 0
    assert results(tmp_path / "run")["steps"] == 9


def test_a_moved_run_keeps_its_best_checkpoint(tmp_path):
    fit = [*FIT, *NEVER_BETTER, "--trainer.max_epochs=2", "--resume"]
    run([*fit, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    (tmp_path / "run").rename(tmp_path / "moved")
    run([*fit, "--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path / 'moved'}"])
    assert step_of(tmp_path / "moved/checkpoints/best.ckpt") == 3


def test_a_run_that_continues_another_ones_checkpoint_saves_it_before_its_first_step(tmp_path):
    run([*FOUR, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'first'}"])
    log = ["--trainer.callbacks=tests.signals.StepsOfLast", f"--trainer.callbacks.file={tmp_path / 'steps'}"]
    begin = f"--ckpt_path={tmp_path / 'first/checkpoints/last.ckpt'}"
    run([*FOUR, *log, begin, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'second'}"])
    assert (tmp_path / "steps").read_text().split() == ["1"]


@pytest.mark.parametrize(
    ("kept", "steps"),
    [
        (["--checkpoint.save_top_k=2"], [1, 2]),
        pytest.param(["--checkpoint.save_top_k=-1"], [1, 2, 3, 4], marks=pytest.mark.slow),
        pytest.param(["--checkpoint.save_top_k=-1", "--checkpoint.monitor=null"], [1, 2, 3, 4], marks=pytest.mark.slow),
    ],
)
def test_each_of_several_best_checkpoints_is_kept_in_a_file_of_its_own(kept, steps, tmp_path):
    folder = tmp_path / "run/checkpoints"
    run([*FOUR, *kept, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert {path.name: step_of(path) for path in folder.iterdir()} == {
        **{f"best-step={step}.ckpt": step for step in steps},
        "last.ckpt": 4,
    }
    best = named_checkpoint("best", tmp_path / "run", folder)
    assert step_of(best) == (4 if "--checkpoint.monitor=null" in kept else 1)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_resumed_run_that_keeps_fewer_checkpoints_never_replaces_the_best_by_a_worse_one(mode, tmp_path):
    sign = 1 if mode == "max" else -1
    scores = {name: torch.tensor(sign * score) for name, score in (("fair", 0.7), ("best", 0.9), ("worst", 0.5))}
    before = RunCheckpoint(str(tmp_path), monitor="score", mode=mode, save_top_k=3)
    before.best_k_models, before.best_model_path = scores, "best"
    before.kth_best_model_path, before.kth_value = "worst", scores["worst"]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for kept, better, worse in ((1, 0.95, 0.8), (2, 0.8, 0.6), (4, 0.1, None)):
        resumed = RunCheckpoint(str(tmp_path), monitor="score", mode=mode, save_top_k=kept)
        resumed.load_state_dict(before.state_dict())
        assert resumed.check_monitor_top_k(trainer, torch.tensor(sign * better))
        assert worse is None or not resumed.check_monitor_top_k(trainer, torch.tensor(sign * worse))
        assert len(resumed.best_k_models) == min(kept, 3)
        assert resumed.best_model_path == "best"


@pytest.mark.parametrize(
    ("filename", "expected"),
    [("best", "best-{step}"), ("{epoch}", "{epoch}-{step}"), ("{step:03d}", "{step:03d}"), ("a-{step}", "a-{step}")],
)
def test_the_step_is_added_to_a_name_only_where_it_is_missing_and_several_are_kept(filename, expected):
    for kept, name in ((3, expected), (-1, expected), (1, filename), (0, filename)):
        assert (
            RunCheckpoint(filename=filename, save_top_k=kept, monitor=None if kept == -1 else "auto").filename == name
        )


def test_a_further_checkpoint_of_the_users_is_left_alone_and_changes_nothing(tmp_path):
    run([*FIT, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'alone'}"])
    users = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss"]
    users += [f"--trainer.callbacks.dirpath={tmp_path / 'theirs'}", "--trainer.callbacks.filename=mine"]
    run([*FIT, *users, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'both'}"])
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["mine.ckpt"]
    assert {path.name for path in (tmp_path / "both/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    for name in ("last", "best", "monitor"):
        assert results(tmp_path / "both")[name] == results(tmp_path / "alone")[name]
