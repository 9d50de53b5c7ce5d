"""Sweep files: the command lines that wandb's agent builds of them are valid for `distill`."""

import os
import random
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml

from distill.__main__ import main
from distill.cli.program import run
from tests.program import ROOT

SWEEPS = sorted((ROOT / "experiments/sweeps").glob("*.yaml"))
KEYS = {"program", "method", "metric", "early_terminate", "parameters", "command"}
SMALL = [
    *("--model.teacher.weights=null", "--data.batch_size=8", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"),
    *("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"),
    *("--trainer.log_every_n_steps=1",),
]
pytestmark = pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)


def sampled(parameters, seed):
    """Draw from a sweep's parameters, as the server does."""
    draw = random.Random(seed)
    found = {}
    for key, rule in parameters.items():
        if "values" in rule:
            found[key] = draw.choice(rule["values"])
        else:
            assert rule["distribution"] == "log_uniform_values", key
            found[key] = rule["min"] * (rule["max"] / rule["min"]) ** draw.random()
    return found


def command_line(file, arguments, folder, monkeypatch):
    """Return the command line that wandb's agent runs for `arguments`, written down by a fake `python`."""
    from wandb.wandb_agent import Agent

    spy = folder / "bin/python"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/words\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # so that what the agent sets is undone
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    sweep = yaml.safe_load(file.read_text())
    agent = SimpleNamespace(
        _sweep_command=sweep["command"], _in_jupyter=False, _function=None, _forward_signals=False, _run_processes={}
    )
    values = {key: {"value": value} for key, value in arguments.items()}
    Agent._command_run(agent, {"run_id": "abc123", "args": values, "program": sweep["program"]})
    agent._run_processes["abc123"].wait()
    return (folder / "words").read_text().splitlines()


@pytest.fixture(autouse=True)
def beside_the_project(tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()  # else it remembers the sweep in the next tests


def value_at(tree, key):
    """Return the value at a dotted key of a resolved configuration."""
    for name in key.split("."):
        tree = tree["init_args"][name] if name in tree.get("init_args", {}) else tree[name]
    return tree


def test_every_parameter_reaches_its_key(file, tmp_path, monkeypatch, capsys):
    sweep = yaml.safe_load(file.read_text())
    assert set(sweep) == KEYS
    given = sampled(sweep["parameters"], seed=0)
    words = command_line(file, given, tmp_path, monkeypatch)
    assert words[:3] == ["-m", "distill", "fit"]
    with pytest.raises(SystemExit) as stop:
        main([*words[2:], "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    tree = yaml.safe_load(printed.out)
    for key, value in given.items():
        assert value_at(tree, key) == (yaml.safe_load(value) if isinstance(value, str) else value), key


@pytest.mark.slow
def test_a_sampled_run_trains_offline_in_a_folder_of_its_own(file, tmp_path, monkeypatch):
    given = sampled(yaml.safe_load(file.read_text())["parameters"], seed=1)
    words = command_line(file, given, tmp_path, monkeypatch)
    cli = run([*words[2:], *SMALL])
    assert cli.trainer.global_step == 2
    folder = tmp_path / "runs/abc123"
    assert (folder / "results.json").exists()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["WandbReport"]["id"] == "abc123"
    assert list((folder / "wandb").glob("offline-run-*-abc123"))
