"""The folder of `distill fit` on the command line, and the checkpoint that a command continues from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer

from distill.callbacks import ExactResume, Results, RunCheckpoint, WandbReport
from distill.cli.saved_configuration import SaveConfiguration
from distill.errors import UserError
from distill.runs.checkpoints import latest_valid_checkpoint, read_checkpoint
from distill.runs.csv_logger import ResumableCSVLogger
from distill.runs.folder import RunFolder, default_folder, is_first_rank
from distill.runs.named_checkpoints import NAMES, named_checkpoint
from distill.runs.refusals import refuse_to_overwrite
from distill.runs.resume import changes


def check_checkpoint(config: Namespace) -> None:
    """Read the checkpoint that `ckpt_path` gives, by its path or by Lightning's name for it, to check it.

    Raises:
        UserError: it is missing, damaged, or not a checkpoint of this project.
    """
    if (given := config.get("ckpt_path")) is None:
        return
    if given in NAMES:
        run = default_folder(config.trainer.default_root_dir)
        config.ckpt_path = str(named_checkpoint(given, run, _checkpoints(config, run)))
    read_checkpoint(config.ckpt_path)


def open_run_folder(config: Namespace) -> RunFolder | None:
    """Claim the folder of a training on rank 0, and join it on the other ranks, which may not know it yet (`None`).

    Raises:
        UserError: the folder cannot be used, or `ckpt_path` is given although the run is to be resumed.
    """
    if config.resume and config.ckpt_path is not None:
        raise UserError("resume: it finds the checkpoint itself, but ckpt_path is given too; remove one of them")
    if not is_first_rank():
        return RunFolder.join()
    return RunFolder.claim(
        config.trainer.default_root_dir,
        resume=config.resume,
        checkpoints=config.checkpoint.dirpath,
        branch=config.ckpt_path is not None,
    )


def try_run_folder(config: Namespace) -> None:
    """Check that a training could use its folder, which is left as it was.

    Raises:
        UserError: `distill fit` would refuse the folder.
    """
    if not config.trainer.fast_dev_run and is_first_rank():
        settings: dict[str, Any] = {"resume": config.resume, "checkpoints": config.checkpoint.dirpath}
        RunFolder.claim(config.trainer.default_root_dir, wait=0.0, **settings).release(failed=True)


def find_run_to_resume(
    run: RunFolder, config: Namespace, parser: ArgumentParser, has_default_task: bool = False
) -> dict[str, Any] | None:
    """Return the newest valid checkpoint of the run in a claimed folder and set `ckpt_path` to it; `None` if none.

    Raises:
        UserError: the run cannot be resumed, or its configuration was another.
    """
    checkpoints = _checkpoints(config, run.path)
    found = latest_valid_checkpoint(checkpoints)
    refuse_to_overwrite(run.path, checkpoints, resumable=found is not None)
    if found is None:
        return None
    path, content = found
    previous = yaml.safe_load(content["distill_config"])
    if config.seed_everything is True:  # any seed: keep the previous one
        config.seed_everything = previous["seed_everything"]
    if has_default_task and previous["model"].get("task") is None:  # of images without labels
        config.model.task = None
    current = yaml.safe_load(parser.dump(config, skip_none=False))
    if different := changes(previous, current):
        shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
        raise UserError(
            f"resume: the run of {str(path)!r} had a different configuration: {shown}; give the same, or start a "
            "new run from this checkpoint with --ckpt_path instead of --resume"
        )
    heads = config.model.get("heads")
    if heads:  # as they were, since optimizers know parameters by their place
        config.model.heads = {name: heads[name] for name in previous["model"]["heads"]}
    config.ckpt_path = str(path)
    return content


def write_to(run: RunFolder, trainer: Trainer) -> None:
    """Let a trainer's loggers and callbacks write to the run's folder."""
    for logger in trainer.loggers:
        if isinstance(logger, ResumableCSVLogger):
            logger.folder = run.path
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's Trainer has them
        if isinstance(callback, RunCheckpoint):
            callback.dirpath = callback.dirpath or str(run.path / "checkpoints")
        elif isinstance(callback, Results | SaveConfiguration):
            callback.folder = run.path


def csv_logger(folder: Path | None, resumed: dict[str, Any] | None) -> ResumableCSVLogger:
    """Return the logger of a training; it continues the file of the run whose checkpoint is resumed, if one is."""
    return ResumableCSVLogger(folder, _metrics_file(resumed), None if resumed is None else resumed["global_step"])


def wandb_id(resumed: dict[str, Any] | None) -> str | None:
    """Return the id of wandb's run in the checkpoint of a resumed run, if it has one."""
    found: str | None = (resumed or {}).get("callbacks", {}).get("WandbReport", {}).get("id")
    return found


def keep_logs(resumed: dict[str, Any] | None, trainer: Trainer) -> None:
    """Let the checkpoints of a resumed run keep what its loggers continue from, also while they are switched off."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's Trainer has them
        if isinstance(callback, ExactResume):
            callback.metrics_file = _metrics_file(resumed)
        elif isinstance(callback, WandbReport):
            callback.id = wandb_id(resumed)


def _metrics_file(resumed: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the state of `metrics.csv` in the checkpoint of a resumed run, if it has one."""
    found: dict[str, Any] | None = (resumed or {}).get("interrupted", {}).get("metrics_file")
    return found


def _checkpoints(config: Namespace, run: Path) -> Path:
    return Path(config.checkpoint.dirpath or run / "checkpoints")
