"""Options of a tiny training run, and the program in a subprocess."""

import logging
import os
import subprocess
import sys
from pathlib import Path

logging.raiseExceptions = False  # Lightning logs to a standard error that pytest has closed

ROOT = Path(__file__).parents[1]

TINY = [
    "--data=Digits",
    "--data.batch_size=16",
    "--model.student=Timm",
    "--model.student.name=test_resnet",
    "--model.optimizer=SGD",
    "--model.optimizer.lr=0.01",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
TEACHER = ["--model.teacher=Timm", "--model.teacher.name=test_efficientnet"]
KD = ["--model.heads.kd.head=KD"]
RKD = ["--model.heads.rkd.head=RKD"]


def in_a_process(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `distill ARGS` in a subprocess, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "distill", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "CUDA_VISIBLE_DEVICES": "", **environment},
    )
