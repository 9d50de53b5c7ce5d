"""Size of a checkpoint, and the time to write and to read it; a check that the teacher's weights are not in it.

python experiments/benchmarks/checkpoint.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Setting, this_project
from pairs import pairs
from step import trainer_for
from timing import CONSOLE, Bound, Run, command_line, interleaved, megabytes, milliseconds, spread, table
from torch import Tensor
from torch.utils.data import DataLoader

OVERHEAD = 1.02
"""Bound on the bytes of a checkpoint, relative to the student's and the optimizer's tensors."""


def measure(run: Run) -> list[Bound]:
    """Print a table; return the bounds on the bytes."""
    rows, bounds = [], []
    for pair in pairs(run):
        setting = Setting(pair, run)
        module = this_project(setting)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_for(setting, Path(folder), steps=1)
            trainer.fit(module, DataLoader([setting.batch], batch_size=None))  # type: ignore[arg-type]  # a list will do
            file = Path(folder) / "last.ckpt"
            works = {
                "write": partial(trainer.save_checkpoint, file),
                "read": partial(torch.load, file, map_location="cpu", weights_only=True),
            }
            works["write"]()  # so that there is a file to read in any order
            seconds = interleaved(works, run.repeat(5), run, pair.title)
            size = file.stat().st_size
            keys = torch.load(file, map_location="cpu", weights_only=True)["state_dict"].keys()
        assert module.teacher is not None
        student = _bytes(module.student.state_dict().values())
        optimizer = _bytes(_tensors(trainer.optimizers[0].state_dict()))
        teacher = _bytes(module.teacher.network.state_dict().values())
        times = [
            f"{milliseconds(best)} ({' / '.join(map(milliseconds, quarters))})"
            for best, *quarters in map(spread, seconds.values())
        ]
        rows.append([pair.title, *map(megabytes, (size, student, optimizer, teacher)), *times])
        what = f"8 checkpoint, {pair.title}"
        bounds += [
            Bound(f"{what}: bytes / student's and optimizer's", size / (student + optimizer), at_most=OVERHEAD),
            Bound(f"{what}: weights of the teacher in it", _named("teacher", keys), at_most=0),
        ]
    head = ["", "MB", "student's", "optimizer's", "teacher's, not in it", "ms to write (quartiles)", "to read"]
    CONSOLE.print(table("A checkpoint", head, rows))
    return bounds


def _named(word: str, keys: Iterable[str]) -> int:
    return sum(word in key for key in keys)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(state: Any) -> Iterable[Tensor]:
    """Iterate over all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for item in state.values() if isinstance(state, dict) else state:
            yield from _tensors(item)


if __name__ == "__main__":
    command_line(measure, __doc__.splitlines()[0])
