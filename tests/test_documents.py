"""The README shows only what its commands do: each is run as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill.__main__ import main
from tests.program import ROOT, TINY, in_a_process

README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    (PYTHONPATH=\. )?distill ", line)]


def block(first_line):
    """The fenced block of the README that begins with a line."""
    found = re.search(rf"```\w+\n({re.escape(first_line)}\n.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {first_line!r}"
    return found[1]


@pytest.fixture
def beside_the_project(tmp_path, monkeypatch):
    """A folder in which the README's relative paths hold, and nothing of the project is written to."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "my_heads.py").write_text(block("# my_heads.py"))
    (tmp_path / "my_heads.yaml").write_text(block("# my_heads.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", [line for line in COMMANDS if " fit " in line])
def test_a_fit_command_is_understood(command, beside_the_project, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(beside_the_project))
    words = shlex.split(command)
    with pytest.raises(SystemExit) as stop:
        main([*words[words.index("distill") + 1 :], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_the_readmes_stages_are_understood(beside_the_project, capsys):
    (beside_the_project / "stages.yaml").write_text(block("model:"))
    configs = ["--config=experiments/digits/distill.yaml", "--config=stages.yaml"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "After" in printed.out


def test_the_readmes_head_trains(beside_the_project):
    quick = [word for word in TINY if "student" not in word and "optimizer" not in word]
    found = in_a_process(
        *("fit", "--config", "experiments/digits/distill.yaml", "--config", "my_heads.yaml"),
        *(*quick, "--model.teacher.weights=null", "--trainer.log_every_n_steps=1"),
        cwd=beside_the_project,
    )
    assert found.returncode == 0, found.stderr
    assert "train/mine_weighted" in (beside_the_project / "runs/digits/mine/metrics.csv").read_text()


def test_the_places_that_the_readme_names_exist():
    for place in re.findall(r"`((?:distill|experiments|tests)/[\w/.]+)`", README):
        assert (ROOT / place).exists(), place


def test_the_heads_that_the_readme_lists_are_those_there_are():
    from distill.heads import shipped

    row = next(line for line in README.splitlines() if "Heads:" in line)
    assert set(re.findall(r"`(\w+)`", row.split("Heads:")[1])) == set(shipped()) - {"CrossEntropy"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs_as_it_stands(beside_the_project):
    (beside_the_project / "bin").mkdir()
    program = beside_the_project / "bin" / "distill"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m distill "$@"\n')
    program.chmod(0o755)
    for command in COMMANDS:
        found = subprocess.run(
            f'export PATH="$PWD/bin:$PATH"; {command}', shell=True, capture_output=True, text=True, timeout=600
        )
        assert found.returncode == 0, f"{command}\n{found.stderr[-2000:]}"
    assert Path("student.safetensors").exists()
