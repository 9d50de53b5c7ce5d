"""Where a run keeps what it writes."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from distill.errors import UserError

_TRACES = ("config.yaml", "metrics.csv", "checkpoints")


def new_folder(root: str | None, resumed: str | None) -> Path:
    """A folder that no run has used: `root`, or a numbered one where `root` is not given or is resumed from.

    Args:
        root: the folder that is asked for. Without one it is `runs/run-1`, `runs/run-2`, ..., or in a sweep of wandb
            `runs/<id of wandb's run>`.
        resumed: the checkpoint that is gone on from, if there is one.

    Raises:
        UserError: `root` holds a run already.
    """
    folder = Path(root) if root is not None else _of_a_sweep()
    if folder is None:
        return _unused(Path("runs"), "run")
    if getattr(rank_zero_only, "rank", 0) != 0:  # rank 0 looked first, and may have begun to write
        return folder
    if not any((folder / name).exists() for name in _TRACES):
        return folder
    if resumed is not None:
        return _unused(folder, "resumed")
    raise UserError(
        f"trainer.default_root_dir: {str(folder)!r} holds a run already and is not overwritten; give another folder, "
        f"or continue that run with --resume, or apart from it with --ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    )


def folder_to_resume(root: str | None) -> Path:
    """The folder of the run to go on with: `root`, or the latest `runs/run-N`, be there a run already or not."""
    if root is not None:
        return Path(root)
    if (folder := _of_a_sweep()) is not None:
        return folder
    numbers = [path.name.removeprefix("run-") for path in Path("runs").glob("run-*")]
    return Path("runs") / f"run-{max((int(number) for number in numbers if number.isdigit()), default=1)}"


def _of_a_sweep() -> Path | None:
    """In a run that an agent of wandb has started, a folder by the run's id."""
    run = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return Path("runs") / run if run else None


def _unused(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
