"""The file of curves: new columns, full disks and resumes."""

import csv

import pytest

from distill.__main__ import main
from distill.runs.csv_logger import ResumableCSVLogger
from tests.program import TINY
from tests.test_export import files_of_at_most


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(folder, steps):
    logger = ResumableCSVLogger(folder)
    for step in range(steps):
        logger.log_metrics({"train/loss": float(step)}, step)
    return logger.state(None)


def test_a_new_column_is_added_to_the_rows_before_it(tmp_path):
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.save()
    logger.log_metrics({"val/top1": 0.5}, 0)
    logger.save()
    assert rows(tmp_path) == [
        {"step": "0", "train/loss": "1.0", "val/top1": ""},
        {"step": "0", "train/loss": "", "val/top1": "0.5"},
    ]


def test_a_full_disk_while_a_column_is_added_loses_no_row(tmp_path):
    logger = ResumableCSVLogger(tmp_path)
    for step in range(5):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.save()
    logger.log_metrics({"val/top1": 0.5}, 5)
    with files_of_at_most(20), pytest.raises(OSError, match="too large"):
        logger.save()
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3", "4"]


def test_a_resume_drops_the_rows_after_its_checkpoint(tmp_path):
    state = logged(tmp_path, 3)
    logged(tmp_path / "longer", 5)
    (tmp_path / "longer" / "metrics.csv").replace(tmp_path / "metrics.csv")
    logger = ResumableCSVLogger(tmp_path, state)
    logger.log_metrics({"train/loss": 7.0}, 3)
    logger.save()
    assert [row["train/loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "7.0"]


def test_a_resume_says_which_rows_are_lost(tmp_path):
    state = logged(tmp_path, 3)
    with (tmp_path / "metrics.csv").open() as file:
        kept = file.readlines()[:2]
    (tmp_path / "metrics.csv").write_text("".join(kept))
    logger = ResumableCSVLogger(tmp_path, state)
    with pytest.warns(UserWarning, match="has 1 of the 3 rows"):
        logger.log_metrics({"train/loss": 7.0}, 3)
    logger.save()
    assert [row["train/loss"] for row in rows(tmp_path)] == ["0.0", "7.0"]


def test_a_resume_from_a_checkpoint_without_the_files_state_keeps_the_rows_before_its_step(tmp_path):
    logged(tmp_path, 5)
    logger = ResumableCSVLogger(tmp_path, None, 3)
    logger.log_metrics({"train/loss": 7.0, "train/new": 1.0}, 3)
    logger.save()
    assert [(row["train/loss"], row["train/new"]) for row in rows(tmp_path)] == [
        *(("0.0", ""), ("1.0", ""), ("2.0", "")),
        ("7.0", "1.0"),
    ]
    assert logger.state(None)["rows"] == 4


@pytest.mark.slow
def test_a_run_resumed_for_a_while_without_the_file_goes_on_with_it(tmp_path):
    fit = ["fit", *TINY, "--trainer.limit_train_batches=1", f"--trainer.default_root_dir={tmp_path}", "--resume"]
    fit += ["--trainer.log_every_n_steps=1"]
    for stretch in (["--trainer.max_epochs=2"], ["--trainer.max_epochs=3", "--trainer.logger=false"]):
        assert main([*fit, *stretch]) == 0
    expected = rows(tmp_path)
    assert main([*fit, "--trainer.max_epochs=4"]) == 0
    found = rows(tmp_path)
    assert found[: len(expected)] == expected
    assert {row["step"] for row in found} == {"0", "1", "3"}


@pytest.mark.slow
def test_a_run_begun_without_the_file_and_killed_with_it_can_be_resumed(tmp_path):
    fit = ["fit", *TINY, "--trainer.limit_train_batches=1", f"--trainer.default_root_dir={tmp_path}", "--resume"]
    fit += ["--trainer.log_every_n_steps=1"]
    assert main([*fit, "--trainer.logger=false"]) == 0
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,9.0\n")  # after the checkpoint
    assert main([*fit, "--trainer.max_epochs=2"]) == 0
    assert "9.0" not in [row["train/loss"] for row in rows(tmp_path)]
    assert {row["step"] for row in rows(tmp_path)} == {"1"}
