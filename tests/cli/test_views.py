"""Several views of each image, as a user gives them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distill.__main__ import main
from tests.program import ROOT, TEACHER, TINY, in_a_process

VIEWS = "--data.train_views=[weak,strong]"
KD = ["--model.heads.kd.head=KD"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def test_check_shows_images_and_rows_and_the_views_of_the_terms(capsys):
    chosen = [*KD, "--model.heads.kd.views=[1]", "--model.heads.kd.teacher_views=[0]", "--model.heads.c.head=CRLD"]
    assert main(["check", *TINY, *TEACHER, VIEWS, *chosen]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"effective batch\s+│ 16 = 16 images x 1 devices", shown)
    assert re.search(r"views of each image\s+│ 2, so 32 rows a batch; separate passes", shown)
    assert "1 (teacher 0)" in shown
    assert "view int64 B" in shown


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--model.heads.c.head=CRLD"], "model.heads.c.head: CRLD needs view: give two views of each image, such as"),
        ([*KD, "--model.heads.kd.views=[1]"], "model.heads.kd: views names view 1, but the data give one view, 0"),
        (["--model.heads.v.head=VRM", VIEWS.replace("]", ",weak]")], "VRM compares two views of each image, given 3"),
        ([*KD, "--model.view_passes=both", VIEWS], "model.view_passes"),
        (["--data.train_views=[weak,srong]"], "data.train_views[1] cannot be 'srong': did you mean 'strong'?"),
    ],
)
def test_views_that_do_not_fit_are_one_sentence_before_anything_is_written(args, sentence, capsys, tmp_path):
    assert main(["fit", *TINY, *TEACHER, *args, "--trainer.default_root_dir=run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.slow
def test_two_processes_train_the_student_of_one_on_two_views(tmp_path):
    weights = []
    vits = ["--model.student.name=test_vit", "--model.teacher=Timm", "--model.teacher.name=test_vit2"]
    terms = ["--model.heads.c.head=CRLD", "--model.heads.v.head=VRM", "--model.heads.rrd.head=RRD"]
    terms += ["--model.heads.rrd.head.size=40", "--data.mixing.cutmix=0.4", "--model.view_passes=separate"]
    for name, extra in (
        ("one", ["--data.batch_size=16"]),
        ("two", ["--data.batch_size=8", "--trainer.devices=2", "--trainer.strategy=ddp"]),
    ):
        given = [*TINY, *vits, *terms, VIEWS, *extra, "--trainer.limit_train_batches=3"]
        process = in_a_process("fit", *given, f"--trainer.default_root_dir={name}", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        weights.append(torch.load(file, weights_only=True)["state_dict"])
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=2e-5, msg=lambda text: text)


@pytest.mark.slow
def test_a_run_on_two_views_resumes_bit_for_bit_in_the_middle_of_an_epoch(tmp_path):
    states = []
    given = [*TINY, *TEACHER, VIEWS, "--model.heads.c.head=CRLD", "--model.heads.v.head=VRM"]
    given += ["--trainer.limit_train_batches=4", "--checkpoint.every_n_train_steps=2"]
    for name, stages in (("whole", [[]]), ("stopped", [["--trainer.max_steps=2"], ["--resume"]])):
        for stage in stages:
            assert main(["fit", *given, *stage, f"--trainer.default_root_dir={name}"]) == 0
        states.append(torch.load(Path(name) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_the_stored_rows_of_both_views_are_verified_and_replayed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    given = [*TINY, "--data=tests.training.stored_runs.Pictures", VIEWS, "--model.heads.c.head=CRLD"]
    assert main(["store", *given, *TEACHER, "--output=store"]) == 0
    states = []
    for name, teacher in (
        ("live", TEACHER),
        ("replayed", ["--model.teacher=StoredTeacher", "--model.teacher.path=store", "--model.teacher.verify=40"]),
    ):
        assert main(["fit", *given, *teacher, f"--trainer.default_root_dir={name}"]) == 0
        states.append(torch.load(Path(name) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
