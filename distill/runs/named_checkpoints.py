"""The checkpoints that Lightning calls `last`, `best` and `hpc`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.runs.checkpoints import read_checkpoint

NAMES = ("last", "best", "hpc")


def named_checkpoint(name: str, run: Path, checkpoints: Path) -> Path:
    """Return the path of a run's checkpoint by its name in Lightning.

    Args:
        name: `last`, the latest state; `best`, the best by the run's monitor; or `hpc`, the latest that Lightning has
            saved for a job being requeued by SLURM.
        run: the run's folder.
        checkpoints: the folder of its checkpoints.

    Raises:
        UserError: there is no such checkpoint.
    """
    if name == "last":
        path: Path | None = checkpoints / "last.ckpt"
    elif name == "best":
        path = _best(checkpoints)
    else:
        path = max(run.glob("hpc_ckpt_*.ckpt"), key=_number, default=None)
    if path is None or not path.is_file():
        raise UserError(
            f"ckpt_path: there is no checkpoint {name!r} in {str(run if name == 'hpc' else checkpoints)!r}; give the "
            "path of one, or that run's trainer.default_root_dir"
        )
    return path


def _best(checkpoints: Path) -> Path | None:
    """Return the checkpoint that the latest state calls the best, even if the folder was moved."""
    last = checkpoints / "last.ckpt"
    states: dict[str, Any] = read_checkpoint(last).get("callbacks", {}) if last.is_file() else {}
    names = [Path(state["best_model_path"]).name for state in states.values() if _has_best(state)]
    return next((checkpoints / name for name in names if (checkpoints / name).is_file()), None)


def _has_best(state: Any) -> bool:
    return isinstance(state, dict) and bool(state.get("best_model_path"))


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else -1
