"""The study of a grid: one command, one table, and nothing lost when it is killed."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from distill.heads import shipped
from tests.program import ROOT

DIGITS = ROOT / "experiments" / "digits"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("study")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("study_table")


def result(last, best, agreement=None):
    return {"last": last, "best": best, "agreement": agreement}


def test_the_study_of_digits_has_every_head():
    heads = set()
    for file in (DIGITS / "methods").glob("*.yaml"):
        for term in yaml.safe_load(file.read_text())["model"]["heads"].values():
            heads.add(term["head"] if isinstance(term["head"], str) else term["head"]["class_path"])
    assert heads == {name for name, head in shipped().items() if head.needs_teacher}


def test_a_row_has_mean_and_deviation_of_the_seeds(table):
    finished = {
        ("a", "student"): [result(70.0, 71.0), result(72.0, 72.0)],
        ("a", "kd"): [result(73.0, 74.0, 90.0), result(75.0, 76.0, 80.0)],
        ("b", "kd"): [result(60.0, 61.0, 50.0)],
    }
    best, second, alone = table.summary(finished, {("a", "kd"): 73.33, ("a", "rkd"): 1.0})
    assert [row["method"] for row in (best, second, alone)] == ["kd", "student", "kd"]
    assert (best["last"], best["best"], best["seeds"]) == (74.0, 75.0, 2)
    assert (best["last_sd"], best["best_sd"]) == (pytest.approx(2**0.5), pytest.approx(2**0.5))
    assert (best["over_student"], best["agreement"], best["published"]) == (3.0, 85.0, 73.33)
    assert (second["over_student"], second["agreement"], second["published"]) == (None, None, None)
    assert (alone["last"], alone["last_sd"], alone["over_student"]) == (60.0, None, None)


def test_the_table_is_written_as_csv_and_as_a_picture(table, tmp_path, capsys):
    finished = {(pair, "kd"): [result(73.0, 74.0, 90.0), result(75.0, 76.0, 80.0)] for pair in "abcd"}
    table.write(
        table.summary(finished, {("a", "kd"): 73.33}), finished, tmp_path / "root", tmp_path / "pictures" / "x.png"
    )
    with open(tmp_path / "root" / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pair"], row["last"], row["published"]) for row in rows][:2] == [
        ("a", "74.0", "73.33"),
        ("b", "74.0", ""),
    ]
    assert (tmp_path / "pictures" / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_published_figures_are_read_by_pair_and_method(table, tmp_path):
    figures = table.published(ROOT / "experiments" / "cifar100" / "published.csv")
    assert figures["resnet32x4_resnet8x4", "rrd_kd"] == 75.08
    assert table.published(tmp_path / "none.csv") == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digit"], "study: 'digit' is no study: "),
        (["digits", "--methods", "rdk"], "study: --methods cannot be 'rdk': did you mean 'rrd', 'rld' or 'rkd'?"),
        (["cifar100", "--pairs", "x"], "study: --pairs cannot be 'x'"),
        (["digits", "--seeds", "0"], "study: --seeds must be at least 1, given 0"),
        (["digits", "--jobs", "0"], "study: --jobs must be at least 1, given 0"),
        (["digits", "--draws", "0"], "study: --draws must be at least 1, given 0"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_sentence(args, message, study, tmp_path, capsys):
    assert study.main([*args, "--root", str(tmp_path / "root")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "root").exists()


def command(root, *methods, passed):
    """The study as a user types it."""
    return [
        *(sys.executable, str(ROOT / "experiments" / "study.py"), "digits", "--root", str(root), "--seeds", "1"),
        *("--teacher", str(DIGITS / "teacher.yaml"), "--methods", *methods, "--", "--data.batch_size=32", *passed),
    ]


@pytest.mark.slow
def test_a_killed_study_resumes_to_the_same_figures_and_keeps_what_is_finished(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    passed = ["--trainer.max_epochs=10", "--trainer.limit_train_batches=6"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = command(whole, "kd", "student", passed=passed)
    found = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    cell = "resnet10t_test_resnet/kd/seed-0"
    expected = json.loads((whole / cell / "test.json").read_text())

    shutil.copytree(whole / "teacher", killed / "teacher")
    given = command(killed, "kd", passed=passed)
    process = subprocess.Popen(given, cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    checkpoint = killed / cell / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (killed / cell / "test.json").exists()

    found = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    resumed = json.loads((killed / cell / "test.json").read_text())
    assert [resumed[key] for key in ("last", "best")] == [expected[key] for key in ("last", "best")]
    assert sorted(path.name for path in (killed / cell).iterdir()) == sorted(
        path.name for path in (whole / cell).iterdir()
    ), "the run resumed in its own folder"

    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*.ckpt")}
    given = command(whole, "kd", "student", passed=passed)
    found = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*.ckpt")} == before, "nothing is trained anew"
    with open(whole / "study.csv", newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"kd", "student"}


@pytest.mark.slow
def test_a_study_with_draws_runs_the_teacher_once_for_all_methods_and_seeds(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = command(
        tmp_path, "kd", "at", "student", passed=["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    )
    given[given.index("--seeds") + 1] = "2"
    given[given.index("--") : given.index("--")] = ["--draws", "2"]
    found = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "at: runs with the teacher itself" in found.stdout, "it compares whole feature maps"
    pair = tmp_path / "resnet10t_test_resnet"
    assert json.loads((pair / "answers.json").read_text())["methods"] == ["kd"]
    for seed in (0, 1):
        teachers = {
            method: yaml.safe_load((pair / method / f"seed-{seed}" / "config.yaml").read_text())["model"]["teacher"]
            for method in ("kd", "at", "student")
        }
        assert teachers["student"] is None
        assert teachers["kd"]["init_args"]["path"] == str(pair / "answers")
        assert "Timm" in teachers["at"]["class_path"]
        assert json.loads((pair / "kd" / f"seed-{seed}" / "test.json").read_text())["last"]["test/agreement"] >= 0

    before = {file: file.stat().st_mtime_ns for file in (pair / "answers").rglob("*.*")}
    again = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {file: file.stat().st_mtime_ns for file in (pair / "answers").rglob("*.*")} == before
