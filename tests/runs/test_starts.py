"""Real starts of the program that compete for a folder, and runs of several processes that share one."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.fork_server import ForkServer, wait_for
from tests.program import KD, ROOT, TEACHER, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FIT = ["fit", *TINY, "--trainer.log_every_n_steps=1"]
LONG = [*FIT, "--trainer.limit_train_batches=20", "--trainer.max_epochs=100", "--checkpoint.every_n_train_steps=2"]
RUN = ["checkpoints", "config.yaml", "metrics.csv", "results.json"]
RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.student.name=test_vit"]


@pytest.fixture
def server(tmp_path):
    server = ForkServer(tmp_path)
    yield server
    server.close()


def listed(folder):
    return sorted(os.listdir(folder))


def test_two_starts_at_the_same_moment_without_a_folder_take_two(server, tmp_path):
    processes = [server.start(FIT) for _ in range(2)]
    assert [server.code(process) for process in processes] == [0, 0], server.errors
    assert listed(tmp_path / "runs") == ["run-1", "run-2"]
    assert listed(tmp_path / "runs/run-1") == listed(tmp_path / "runs/run-2") == RUN


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_of_two_starts_at_the_same_moment_in_one_folder_one_is_refused(server, tmp_path, resume):
    command = [*FIT, *resume, "--trainer.max_epochs=200", "--trainer.default_root_dir=run"]
    processes = [server.start(command) for _ in range(2)]
    assert wait_for(lambda: "is in use by another run (process" in server.errors, processes[0])
    codes = []
    for process in processes:
        if f"(process {process} on" in server.errors:
            os.kill(process, signal.SIGKILL)
        codes.append(server.code(process))
    assert sorted(codes) == [-signal.SIGKILL, 2], server.errors


def test_a_run_killed_while_its_workers_live_resumes_at_once(server, tmp_path):
    command = [*LONG, "--data.num_workers=2", "--resume", "--trainer.default_root_dir=run"]
    process = server.start(command)
    metrics = tmp_path / "run/metrics.csv"
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, process), server.errors
    assert (tmp_path / "run/run.lock").read_text().startswith(f"process {process} on ")
    beside = server.start(command)
    start = time.monotonic()
    assert server.code(beside) == 2
    assert time.monotonic() - start > 9, "requeued jobs are waited for"
    assert f"'run' is in use by another run (process {process} on" in server.errors
    workers = [int(number) for number in children(process)]
    os.kill(process, signal.SIGKILL)
    assert server.code(process) == -signal.SIGKILL
    start = time.monotonic()
    assert any(os.path.exists(f"/proc/{worker}") for worker in workers)
    again = server.start(command)
    held = f"process {again} on "
    assert wait_for(lambda: (tmp_path / "run/run.lock").read_text().startswith(held), again, 9), server.errors
    os.kill(again, signal.SIGKILL)
    server.code(again)


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["global_step"]


def children(process):
    with open(f"/proc/{process}/task/{process}/children") as file:
        return file.read().split()


def environment(folder):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def program(*words, folder):
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=900
    )


LAUNCHERS = {
    "Lightning's launcher": ["distill"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distill"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_share_a_folder_that_only_the_first_has_chosen(launcher, tmp_path):
    words = LAUNCHERS[launcher]
    (tmp_path / "runs/run-1").mkdir(parents=True)
    ended = program(*words, *FIT, *RANKS, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert listed(tmp_path / "runs") == ["run-1", "run-2"]
    assert listed(tmp_path / "runs/run-2") == RUN
    resumed = program(*words, *FIT, *RANKS, "--trainer.max_epochs=2", "--resume", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert listed(tmp_path / "runs") == ["run-1", "run-2"]
    last = torch.load(tmp_path / "runs/run-2/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert yaml.safe_load((tmp_path / "runs/run-2/config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_a_refused_start_of_two_ranks_leaves_nothing_behind(tmp_path):
    refused = program("distill", *FIT, *RANKS, *TEACHER, *KD, "--ckpt_path=nowhere.ckpt", folder=tmp_path)
    assert refused.returncode == 2
    assert listed(tmp_path) == []


def test_a_sigterm_stops_two_ranks_after_the_same_step_and_loses_no_gradient(server, tmp_path):
    fit = [*FIT, "--model.student.name=test_vit", "--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    fit += [
        "--trainer.limit_train_batches=6",
        "--trainer.accumulate_grad_batches=4",
        "--trainer.max_epochs=3",
        "--resume",
    ]
    assert server.run([*fit, "--trainer.default_root_dir=undisturbed"]) == 0, server.errors
    fit += ["--trainer.callbacks=tests.signals.TermInAccumulation", "--trainer.callbacks.batch=7"]
    fit += ["--trainer.default_root_dir=disturbed"]
    last = tmp_path / "disturbed/checkpoints/last.ckpt"
    process = server.start(fit)
    assert wait_for(lambda: last.exists() and step_of(last) == 3 and not children(process), process), server.errors
    os.kill(process, signal.SIGKILL)  # with forks, Lightning waits forever for the results of ranks that SIGTERM ended
    server.code(process)
    saved = torch.load(last, weights_only=True)
    assert not saved["interrupted"]["is_accumulating"]
    assert server.run(fit) == 0, server.errors
    actual, expected = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("disturbed", "undisturbed")
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    rows = [(tmp_path / run / "metrics.csv").read_text() for run in ("disturbed", "undisturbed")]
    assert rows[0] == rows[1]
