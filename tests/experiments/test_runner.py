"""The runner behind studies and comparisons, and the comparisons on the digits."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from distill.__main__ import main
from tests.program import ROOT

DIGITS = ROOT / "experiments" / "digits"
COMPARISONS = ["demo", "longtail"]


@pytest.fixture
def module(monkeypatch):
    """Import a module of the experiments by its name, as their programs do."""
    for folder in (ROOT / "experiments", DIGITS):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def result(run, **figures):
    return {"last": figures, "best": figures, "parameters": 1234, "seconds": 5.0, "given": run.given}


def test_a_result_of_other_arguments_is_not_taken_for_this_one(module, tmp_path):
    runner = module("runner")
    config = tmp_path / "recipe.yaml"
    config.write_text("seed_everything: 0")
    run = runner.Run("kd", tmp_path, (f"--config={config}", "--trainer.max_epochs=2"))
    assert run.result is None
    written = result(run)
    (tmp_path / "test.json").write_text(json.dumps(written))
    assert run.result == written
    config.write_text("seed_everything: 1")
    with pytest.raises(runner.UserError, match="of a run with other arguments or configurations"):
        _ = run.result
    config.write_text("# a remark\nseed_everything: 0")
    assert run.result == written
    for fit, test in [((*run.fit[:1], "--trainer.max_epochs=3"), None), (run.fit, ("--data.batch_size=2",))]:
        with pytest.raises(runner.UserError, match="of a run with other arguments or configurations"):
            _ = runner.Run("kd", tmp_path, fit, test).result


def test_a_run_resumes_in_its_own_folder_and_tests_its_last_checkpoint(module, tmp_path):
    run = module("runner").Run("kd", tmp_path, ("--config=a.yaml",), ("--config=b.yaml",))
    assert run.fit_command == ["fit", "--config=a.yaml", f"--trainer.default_root_dir={tmp_path}", "--resume"]
    assert run.test_command == ["test", "--config=b.yaml", f"--ckpt_path={tmp_path}/checkpoints/last.ckpt"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_models_of_a_comparison_are_understood(name, module, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    models = module(name).models(tmp_path)
    assert len({model.folder for model in models}) == len(models)
    for model in models:
        run = model.run(tmp_path, 3, ["--trainer.max_epochs=1"])
        for command in (run.fit_command, run.test_command)[: 1 if run.test is None else 2]:
            with pytest.raises(SystemExit) as stop:
                main([*command, "--print_config"])
            printed = capsys.readouterr()
            assert stop.value.code == 0, printed.err
            tree = yaml.safe_load(printed.out)
            assert tree["trainer"]["max_epochs"] == 1
            if command[0] == "fit":
                assert tree["seed_everything"] == 3
            if (teacher := tree["model"]["teacher"]) is not None:
                assert teacher["init_args"]["weights"] == str(tmp_path / "teacher" / "checkpoints" / "last.ckpt")


def test_the_table_of_a_comparison_has_means_and_deviations_of_the_seeds(module, tmp_path, capsys):
    comparison, runner = module("comparison"), module("runner")
    run = runner.Run("a", tmp_path, ())
    finished = {
        "teacher": [result(run, top1=0.9), result(run, top1=0.7)],
        "student": [result(run, top1=0.5)],
    }
    with runner.CONSOLE.capture() as capture:
        runner.CONSOLE.print(comparison.table(finished, {"top-1 (%)": "top1"}))
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in capture.get().splitlines() if line[0] in "│┃"]
    assert rows == [
        ["model", "parameters", "top-1 (%)", "seconds"],
        ["teacher", "1,234", "80.0 ± 14.1", "5 ± 0"],
        ["student", "1,234", "50.0", "5"],
    ]


def test_a_comparison_without_seeds_is_refused_in_one_sentence(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert module("demo").main(["--seeds", "0", "--root", str(tmp_path / "root")]) == 2
    assert capsys.readouterr().err == "demo: --seeds must be at least 1, given 0\n"
    assert not (tmp_path / "root").exists()


@pytest.mark.slow
def test_the_demo_shows_its_commands_and_its_table_and_skips_what_is_finished(tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    small = ["--data.batch_size=32", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    command = [sys.executable, "experiments/digits/demo.py", "--", *small]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    shown = re.findall(r"^\$ distill (\w+) .*runs/digits/(\w+)", found.stdout, re.MULTILINE)
    assert shown == [(command, folder) for folder in ("teacher", "student", "distill") for command in ("fit", "test")]
    table = found.stdout[found.stdout.rindex("┏") :]
    assert all(name in table for name in ("teacher", "student alone", "student distilled")), table

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.ckpt")}
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.ckpt")} == before, "nothing is trained anew"
    assert again.stdout[again.stdout.rindex("┏") :] == table
