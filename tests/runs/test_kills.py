"""A run killed twenty times at random moments equals an uninterrupted run bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.program import KD, ROOT, TEACHER, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 20
COMMAND = [
    *("fit", "--resume", *TINY, *TEACHER, *KD),
    *("--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=100"),
    *("--model.heads.rkd.head=RKD", "--model.heads.rkd.weight=Warmup", "--model.heads.rkd.weight.value=1.0"),
    *("--model.heads.rkd.weight.steps=40", "--model.student.options={drop_path_rate: 0.2, drop_rate: 0.3}"),
    *("--model.optimizer=AdamW", "--model.optimizer.lr=0.001", "--model.scheduler=Cosine"),
    *(
        "--model.scheduler.start=1.0",
        "--model.scheduler.end=0.0",
        "--data.mixing.mixup=0.4",
        "--data.mixing.cutmix=0.4",
    ),
    *("--data.repetitions=2", "--data.num_workers=1", "--trainer.callbacks=EMAWeightAveraging"),
    *("--trainer.callbacks.decay=0.9", "--trainer.max_epochs=6", "--trainer.limit_train_batches=20"),
    *("--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1", "--checkpoint.every_n_train_steps=3"),
]
FORK_SERVER = """
import os, sys
import distill.cli.program, timm, torchvision, torch._dynamo
from distill.__main__ import main
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        os.setpgid(0, 0)
        with open(os.devnull, "w") as nothing, open("errors.log", "a") as errors:
            os.dup2(nothing.fileno(), 1)
            os.dup2(errors.fileno(), 2)
        os._exit(main(line.split("\\0")[:-1]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkServer:
    """Starts `distill` in forks of a process that has already imported everything."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.read() == "ready"

    def read(self):
        return self.process.stdout.readline().strip()

    def start(self, args):
        """Start `distill ARGS` in a new process and return its id."""
        self.process.stdin.write("\0".join(args) + "\0\n")
        self.process.stdin.flush()
        return int(self.read())

    def code(self):
        """Return the exit code of that process, or minus the signal that killed it."""
        return int(self.read())


def wait_for(condition, process, limit=120):
    """Wait for a condition; return False if the process ends first or the time limit is exceeded."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline or is_over(process):
            return False
        time.sleep(0.0005)
    return True


def is_over(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_twenty_kills_change_no_bit(tmp_path):
    server = ForkServer(tmp_path)
    start = time.monotonic()
    server.start([*COMMAND, "--trainer.default_root_dir=undisturbed"])
    assert server.code() == 0, (tmp_path / "errors.log").read_text()[-3000:]
    duration = time.monotonic() - start
    generator = random.Random(7)
    disturbed = [*COMMAND, "--trainer.default_root_dir=disturbed"]
    checkpoints = tmp_path / "disturbed/checkpoints"
    kills = during_a_write = 0
    while kills < KILLS:
        process = server.start(disturbed)
        if kills % 4 == 3:  # during the write of a checkpoint
            time.sleep(generator.uniform(0.0, 0.2) * duration)
            wait_for(lambda: any(checkpoints.glob("*.part")), process)
        else:
            time.sleep(generator.uniform(0.0, 0.4) * duration)
        if not is_over(process):
            os.killpg(process, signal.SIGKILL)
        code = server.code()
        assert code in (0, -signal.SIGKILL), (tmp_path / "errors.log").read_text()[-3000:]
        if code == 0:  # the run ended before the kill: start again
            os.rename(tmp_path / "disturbed", tmp_path / f"whole-{kills}")
            assert_same(tmp_path / f"whole-{kills}", tmp_path / "undisturbed")
            continue
        kills += 1
        during_a_write += any(checkpoints.glob("*.part"))
    server.start(disturbed)
    assert server.code() == 0, (tmp_path / "errors.log").read_text()[-3000:]
    server.process.stdin.close()
    assert during_a_write >= 1
    assert_same(tmp_path / "disturbed", tmp_path / "undisturbed")


def assert_same(folder, undisturbed):
    paths = (run / "checkpoints/last.ckpt" for run in (folder, undisturbed))
    actual, expected = (torch.load(path, weights_only=True) for path in paths)
    for key in ("state_dict", "current_model_state"):
        different = [name for name in expected[key] if not torch.equal(actual[key][name], expected[key][name])]
        assert not different, f"{key}: {len(different)} tensors differ, among them {different[:3]}"
    assert (folder / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()
