"""`distill` in forks of a process that has already imported everything, so that a start takes a moment."""

import os
import subprocess
import sys
import time

from tests.program import ROOT

_SERVER = """
import os, sys
import distill.cli.program, timm, torchvision, torch._dynamo
from distill.__main__ import main
print("ready", flush=True)
for line in sys.stdin:
    words = line.rstrip("\\n").split("\\0")
    if words[0] == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(words[1]), 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        os.setpgid(0, 0)
        with open(os.devnull, "w") as nothing, open("errors.log", "a") as errors:
            os.dup2(nothing.fileno(), 1)
            os.dup2(errors.fileno(), 2)
        code = 1
        try:
            code = main(words[1:])
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""


class ForkServer:
    """Starts `distill` in forks of a process in `folder`; their errors are appended to `errors.log` there."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, args):
        """Start `distill ARGS` in a new process and return its id."""
        return int(self._ask("start", *args))

    def code(self, process):
        """Return the exit code of a process at its end, or minus the signal that killed it."""
        return int(self._ask("wait", str(process)))

    def run(self, args):
        """Run `distill ARGS` and return its exit code."""
        return self.code(self.start(args))

    @property
    def errors(self):
        """The last errors."""
        return (self.folder / "errors.log").read_text()[-3000:]

    def close(self):
        """End the server."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, *words):
        self.process.stdin.write("\0".join(words) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        return self.process.stdout.readline().strip()


def wait_for(condition, process, limit=120):
    """Wait for a condition; return False if the process ends first or the time limit is exceeded."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline or is_over(process):
            return False
        time.sleep(0.0005)
    return True


def is_over(process):
    """Return True if a process has ended, whether or not its parent has noticed."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
