"""Where a run keeps what it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from distill.errors import UserError

_TRACES = ("config.yaml", "metrics.csv", "results.json", "checkpoints")


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
    if not is_first_rank():  # rank 0 looked first, and may have begun to write
        return folder
    if not any((folder / name).exists() for name in _TRACES):
        return folder
    if resumed is not None:
        return _unused(folder, "resumed")
    raise UserError(
        f"trainer.default_root_dir: {str(folder)!r} holds a run already and is not overwritten; give another folder, "
        f"or continue that run with --resume, or apart from it with --ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    )


def refuse_checkpoints_of_another(folder: Path) -> None:
    """Refuse to begin a run where the checkpoints of another would be overwritten.

    Raises:
        UserError: there are some in `folder`.
    """
    if is_first_rank() and (found := _checkpoints(folder)):
        raise UserError(
            f"checkpoint.dirpath: {str(folder)!r} holds the checkpoints of another run ({_listed(found)}), which are "
            "not overwritten; give another folder"
        )


def refuse_to_overwrite(folder: Path, checkpoints: Path, resumable: bool) -> None:
    """Refuse `--resume` where it would overwrite what it does not resume.

    Args:
        folder: the run's.
        checkpoints: the folder of its checkpoints.
        resumable: whether there is one in it to resume from. Without one the run is begun, so nothing may be there.

    Raises:
        UserError: there are only checkpoints that cannot be resumed from, or figures without any; the checkpoints are
            of a run in another folder; or `results.json` was written by something else.
    """
    if not is_first_rank():  # it looked first, and may have begun to write
        return
    again = "to begin anew, give another trainer.default_root_dir or move what is there away; nothing was changed"
    results = folder / "results.json"
    if results.exists() and not _is_results(results):
        raise UserError(f"resume: {str(results)!r} was not written by a run of distill: {again}")
    if resumable:
        if not any((folder / name).exists() for name in _TRACES):
            raise UserError(
                f"checkpoint.dirpath: {str(checkpoints)!r} holds the checkpoints of another run, there is none to "
                f"resume in {str(folder)!r}; give another folder, or that run's trainer.default_root_dir"
            )
        return
    if found := _checkpoints(checkpoints):
        raise UserError(f"resume: no checkpoint in {str(checkpoints)!r} can be resumed ({_listed(found)}): {again}")
    if found := [name for name in ("metrics.csv", "results.json") if (folder / name).exists()]:
        raise UserError(
            f"resume: {str(folder)!r} holds a run without a checkpoint to resume ({_listed(found)} is left): {again}"
        )


def is_first_rank() -> bool:
    """Whether this process is the run's first."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


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


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def _listed(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _is_results(path: Path) -> bool:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(found, dict) and {"last", "steps", "configuration"} <= found.keys()
