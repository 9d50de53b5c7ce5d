"""A folder belongs to one run at a time, whoever asks for it and however its holder ends."""

import errno
import fcntl
import json
import os
import signal
import time

import pytest

from distill.errors import UserError
from distill.runs.folder import RunFolder
from distill.runs.lock import LOCK


class Fork:
    """Calls a function in a fork of this process, which then stays alive until it is ended."""

    def __init__(self, function, start=None):
        reading, writing = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                if start is not None:
                    os.read(start, 1)
                try:
                    answer = ["path", str(function().path)]
                except UserError as error:
                    answer = ["refused", str(error)]
                except BaseException as error:
                    answer = ["failed", repr(error)]
                os.write(writing, json.dumps(answer).encode() + b"\n")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writing)
        self.pipe = os.fdopen(reading)

    def answer(self):
        return json.loads(self.pipe.readline())

    def kill(self):
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.pipe.close()


@pytest.fixture
def fork(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forks = []

    def begin(function, start=None):
        forks.append(Fork(function, start))
        return forks[-1]

    yield begin
    for each in forks:
        if not each.pipe.closed:
            each.kill()


def at_once(fork, count, function):
    """Call a function in several processes at the same moment."""
    start, go = os.pipe()
    forks = [fork(function, start) for _ in range(count)]
    os.write(go, b"x" * count)
    answers = [each.answer() for each in forks]
    os.close(start)
    os.close(go)
    return answers


def claim(root=None, **options):
    return RunFolder.claim(root, **{"resume": False, "wait": 0.3, **options})


def test_runs_that_start_at_the_same_moment_take_different_numbers(fork):
    answers = at_once(fork, 6, claim)
    assert sorted(answers) == [["path", f"runs/run-{number}"] for number in range(1, 7)]


@pytest.mark.parametrize("resume", [False, True])
def test_of_runs_with_the_same_folder_all_but_one_are_refused_in_a_sentence_that_names_its_process(fork, resume):
    answers = at_once(fork, 4, lambda: claim("run", resume=resume))
    refused = [message for kind, message in answers if kind == "refused"]
    assert len(refused) == 3, answers
    assert ["path", "run"] in answers
    assert "trainer.default_root_dir: 'run' is in use by another run (process " in refused[0]
    assert os.listdir("run") == [LOCK]


def test_runs_that_continue_the_same_checkpoint_take_different_folders(fork, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    answers = at_once(fork, 3, lambda: claim("run", branch=True))
    assert sorted(answers) == [["path", f"run/resumed-{number}"] for number in (1, 2, 3)]


def test_a_resumed_run_waits_for_the_end_of_a_living_one_and_is_then_refused(fork):
    holder = fork(lambda: claim("run"))
    assert holder.answer() == ["path", "run"]
    start = time.monotonic()
    with pytest.raises(UserError, match=f"process {holder.process} on .*wait for its end, or give another folder"):
        claim("run", resume=True)
    assert time.monotonic() - start >= 0.3


def test_a_resumed_run_takes_the_folder_of_one_that_ends_while_it_waits(fork):
    def holds_for_a_moment():
        run = claim("run")
        time.sleep(0.3)
        run.release()
        return run

    assert fork(holds_for_a_moment)
    while not os.path.exists("run/run.lock"):
        time.sleep(0.01)
    run = claim("run", resume=True, wait=20)
    assert os.path.exists("run/run.lock")
    run.release()


def test_a_killed_runs_folder_is_free_at_once_although_its_workers_live(fork):
    workers = []

    def with_worker():
        claim("run")
        worker = os.fork()
        if worker == 0:
            signal.pause()
        return type("Answer", (), {"path": worker})

    holder = fork(with_worker)
    workers.append(int(holder.answer()[1]))
    holder.kill()
    try:
        os.kill(workers[0], 0)  # the worker lives
        claim("run", resume=True, wait=0.0).release()
    finally:
        os.kill(workers[0], signal.SIGKILL)


def test_a_process_is_kept_out_of_its_own_folder_and_keeps_its_lock(fork):
    run = claim("run")
    with pytest.raises(UserError, match=r"in use by another run \(this process\)"):
        claim("run", resume=True)
    assert fork(lambda: claim("run", resume=True)).answer()[0] == "refused"
    run.release()
    claim("run").release()


def test_two_runs_cannot_share_a_folder_of_checkpoints(fork):
    assert fork(lambda: claim("a", checkpoints="shared")).answer() == ["path", "a"]
    with pytest.raises(UserError, match="checkpoint.dirpath: 'shared' is in use by another run"):
        claim("b", checkpoints="shared")
    assert not os.path.exists("b")


def test_the_lock_is_gone_once_the_run_has_ended(fork):
    run = claim("run")
    run.release()
    assert os.listdir("run") == []


def test_a_start_that_is_refused_removes_what_it_has_created_and_nothing_else(fork, tmp_path):
    run = claim("new/parents/run", checkpoints="elsewhere/checkpoints")
    (tmp_path / "new/parents/run/wandb").mkdir()
    (tmp_path / "new/parents/run/wandb/log").write_text("of this start")
    run.release(failed=True)
    assert os.listdir() == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/log.txt").write_text("mine")
    run = claim("mine")
    (tmp_path / "mine/checkpoints").mkdir()
    run.release(failed=True)
    assert os.listdir("mine") == ["log.txt"]


def test_a_run_that_fails_after_its_training_began_keeps_its_files(fork, tmp_path):
    run = claim("run")
    (tmp_path / "run/config.yaml").touch()
    run.release(failed=True)
    assert os.listdir("run") == ["config.yaml"]


def test_a_file_system_without_locks_is_noted_and_used(fork, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.warns(
        UserWarning, match=r"the file system of 'run' has no locks \(No locks available\), so another run"
    ):
        run = claim("run")
    run.release()


@pytest.mark.parametrize("root", ["file", "file/below", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_created_is_refused_in_one_sentence(fork, tmp_path, root):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"trainer.default_root_dir: the folder '.*' cannot be written \("):
        claim(root)


def test_a_process_joins_only_the_folder_of_its_own_launcher(fork):
    run = claim("run")
    assert fork(RunFolder.join).answer() == ["path", "run"]
    environment = os.environ["DISTILL_RUN_FOLDER"]
    run.release()
    assert "DISTILL_RUN_FOLDER" not in os.environ
    os.environ["DISTILL_RUN_FOLDER"] = environment.replace(str(os.getpid()), "0")  # of a run that started this program
    try:
        assert RunFolder.join() is None
    finally:
        del os.environ["DISTILL_RUN_FOLDER"]


def test_a_sweeps_agent_resumes_the_folder_of_its_id(fork, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    first = claim(resume=True)
    (first.path / "config.yaml").touch()
    first.release()
    again = claim(resume=True)
    assert str(again.path) == "runs/abc"
    again.release()
