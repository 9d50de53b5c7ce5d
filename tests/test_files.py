"""Atomic writes: a file is whole or not there, and nothing is left beside it."""

import os
import socket

import pytest

from distill.files import write_atomic


def ended_process() -> int:
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    return process


def test_a_write_removes_what_killed_processes_have_left_of_the_same_file(tmp_path):
    host = socket.gethostname()
    leftover = f"a.json.{host}-{ended_process()}.part"
    kept = {
        f"a.json.{host}-{os.getppid()}.part",  # of a running process
        f"a.json.elsewhere-{ended_process()}.part",
        f"b.json.{host}-{ended_process()}.part",
        "a.json.part",
        "a.json.download.part",
    }
    for name in (leftover, *kept):
        (tmp_path / name).write_text("")
    write_atomic(tmp_path / "a.json", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *kept}


def test_any_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    write_atomic(tmp_path / "kept", b"old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "kept", object())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_processes_that_write_the_same_file_at_the_same_time_leave_one_of_the_contents(tmp_path):
    contents = [bytes([value]) * 200_000 for value in range(3)]
    processes = []
    for content in contents:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                for _ in range(10):
                    write_atomic(tmp_path / "shared", content)
                code = 0
            finally:
                os._exit(code)
        processes.append(process)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0, 0]
    assert (tmp_path / "shared").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
