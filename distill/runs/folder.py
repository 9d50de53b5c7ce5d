"""Selection and protection of a run's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from distill.errors import UserError

_RUN_FILES = ("config.yaml", "metrics.csv", "results.json", "checkpoints")


def new_folder(root: str | None, resumed: str | None) -> Path:
    """Return an unused folder for a run: `root`, or a numbered one if `root` is not given or already used.

    Args:
        root: the requested folder; defaults to `runs/run-1`, `runs/run-2`, ..., or to `runs/<wandb run id>` in a
            wandb sweep.
        resumed: the checkpoint that training continues from, if there is one; with it, a `root` that already holds a
            run gives `root/resumed-1`, `root/resumed-2`, ...

    Raises:
        UserError: `root` already holds a run, and no checkpoint is resumed.
    """
    folder = Path(root) if root is not None else _sweep_folder()
    if folder is None:
        return _unused_folder(Path("runs"), "run")
    if not is_first_rank():  # rank 0 has checked the folder and may already write to it
        return folder
    if not any((folder / name).exists() for name in _RUN_FILES):
        return folder
    if resumed is not None:
        return _unused_folder(folder, "resumed")
    raise UserError(
        f"trainer.default_root_dir: {str(folder)!r} already holds a run and is not overwritten; give another folder, "
        "continue that run with --resume, or start a new one from its checkpoint with "
        f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    )


def refuse_checkpoints_of_another(folder: Path) -> None:
    """Refuse to start a run in a folder with the checkpoints of another run.

    Raises:
        UserError: `folder` contains checkpoints.
    """
    if is_first_rank() and (found := _checkpoint_names(folder)):
        raise UserError(
            f"checkpoint.dirpath: {str(folder)!r} holds the checkpoints of another run ({_listed(found)}), which are "
            "not overwritten; give another folder"
        )


def refuse_to_overwrite(folder: Path, checkpoints: Path, resumable: bool) -> None:
    """Refuse `--resume` if it would overwrite files that it does not resume.

    Args:
        folder: the run's folder.
        checkpoints: the folder of the run's checkpoints.
        resumable: whether that folder contains a checkpoint to resume from. If not, the run starts from the beginning
            and both folders must be unused.

    Raises:
        UserError: no checkpoint can be resumed but files of a run exist, the checkpoints belong to a run in another
            folder, or `results.json` was not written by this project.
    """
    if not is_first_rank():  # rank 0 has checked the folder and may already write to it
        return
    remedy = "to start over, give another trainer.default_root_dir or move the existing files; nothing was changed"
    results = folder / "results.json"
    if results.exists() and not _is_results_file(results):
        raise UserError(f"resume: {str(results)!r} was not written by distill: {remedy}")
    if resumable:
        if not any((folder / name).exists() for name in _RUN_FILES):
            raise UserError(
                f"checkpoint.dirpath: {str(checkpoints)!r} holds the checkpoints of another run, but "
                f"{str(folder)!r} holds no run to resume; give another folder, or that run's trainer.default_root_dir"
            )
        return
    if found := _checkpoint_names(checkpoints):
        raise UserError(f"resume: no checkpoint in {str(checkpoints)!r} can be resumed ({_listed(found)}): {remedy}")
    if found := [name for name in ("metrics.csv", "results.json") if (folder / name).exists()]:
        raise UserError(
            f"resume: {str(folder)!r} holds a run without a checkpoint to resume (only {_listed(found)}): {remedy}"
        )


def is_first_rank() -> bool:
    """Return True in the process of global rank 0."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def folder_to_resume(root: str | None) -> Path:
    """Return the folder of the run to resume, which need not exist: `root`, or the latest `runs/run-N`."""
    if root is not None:
        return Path(root)
    if (folder := _sweep_folder()) is not None:
        return folder
    numbers = [path.name.removeprefix("run-") for path in Path("runs").glob("run-*")]
    return Path("runs") / f"run-{max((int(number) for number in numbers if number.isdigit()), default=1)}"


def _sweep_folder() -> Path | None:
    """Return the folder named by wandb's run id if a wandb agent has started this run."""
    run = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return Path("runs") / run if run else None


def _unused_folder(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def _checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def _listed(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _is_results_file(path: Path) -> bool:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(found, dict) and {"last", "steps", "configuration"} <= found.keys()
