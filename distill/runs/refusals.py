"""Refusals to overwrite the files of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError

_RUN_FILES = ("config.yaml", "metrics.csv", "results.json", "checkpoints")
_OF_SLURM = "hpc_ckpt_*.ckpt"  # Lightning's checkpoints of a job that is requeued


def holds_run(folder: Path) -> bool:
    """Return True if a folder contains files of a run."""
    return any((folder / name).exists() for name in _RUN_FILES) or any(folder.glob(_OF_SLURM))


def training_began(folder: Path) -> bool:
    """Return True if a folder contains what a run writes when its training begins."""
    return (
        (folder / "config.yaml").exists()
        or (folder / "results.json").exists()
        or bool(_checkpoint_names(folder / "checkpoints"))
    )


def refuse_used_folder(folder: Path) -> None:
    """Refuse to start a new run in the folder of another.

    Raises:
        UserError: `folder` contains files of a run.
    """
    if holds_run(folder):
        raise UserError(
            f"trainer.default_root_dir: {str(folder)!r} already holds a run and is not overwritten; give another "
            "folder, continue that run with --resume, or start a new one from its checkpoint with "
            f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
        )


def refuse_checkpoints_of_another(folder: Path) -> None:
    """Refuse to start a run in a folder with the checkpoints of another run.

    Raises:
        UserError: `folder` contains checkpoints.
    """
    if found := _checkpoint_names(folder):
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
        UserError: no checkpoint can be resumed but files of a run exist, the run has its checkpoints in another folder
            or began from one of another run, the checkpoints belong to a run in another folder, or `results.json` was
            not written by this project.
    """
    remedy = "to start over, give another trainer.default_root_dir or move the existing files; nothing was changed"
    results = folder / "results.json"
    if results.exists() and not _is_results_file(results):
        raise UserError(f"resume: {str(results)!r} was not written by distill: {remedy}")
    if resumable:
        if not holds_run(folder):
            raise UserError(
                f"checkpoint.dirpath: {str(checkpoints)!r} holds the checkpoints of another run, but "
                f"{str(folder)!r} holds no run to resume; give another folder, or that run's trainer.default_root_dir"
            )
        return
    began = _configuration(folder)
    for kept in (folder / "checkpoints", (began.get("checkpoint") or {}).get("dirpath")):
        if kept is not None and Path(kept).resolve() != checkpoints.resolve() and _checkpoint_names(Path(kept)):
            raise UserError(
                f"checkpoint.dirpath: {str(checkpoints)!r} has no checkpoint to resume, and the run in {str(folder)!r} "
                f"keeps its own in {str(kept)!r}; give that folder, or move them"
            )
    if found := _checkpoint_names(checkpoints):
        raise UserError(f"resume: no checkpoint in {str(checkpoints)!r} can be resumed ({_listed(found)}): {remedy}")
    written = [name for name in ("metrics.csv", "results.json") if (folder / name).exists()]
    if found := [*written, *sorted(path.name for path in folder.glob(_OF_SLURM))]:
        raise UserError(
            f"resume: {str(folder)!r} holds a run without a checkpoint to resume (only {_listed(found)}): {remedy}"
        )
    if (start := began.get("ckpt_path")) is not None:
        raise UserError(
            f"resume: {str(folder)!r} holds a run that began from {str(start)!r} and has saved no checkpoint: to begin "
            "from there again, give another trainer.default_root_dir and --ckpt_path instead of --resume"
        )


def _configuration(folder: Path) -> dict[str, Any]:
    """Return the saved configuration of the run in a folder; empty if there is none."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


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
