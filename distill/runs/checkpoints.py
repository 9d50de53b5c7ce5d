"""Atomic checkpoint I/O, and the search for the newest valid checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it

from distill.errors import UserError
from distill.files import write_atomic

_LAUNCHERS_FILE = ".temp.ckpt"  # in which Lightning's `ddp_fork` and `ddp_spawn` return the weights of rank 0


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes to a temporary file beside the target and then renames it.

    Lightning's own plugin writes to the system's temporary folder, which is not atomic if that is on another disk.
    Paths with a protocol, such as `s3://`, are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint atomically.

        Raises:
            UserError: the file cannot be written, for example because the disk is full; existing checkpoints stay.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            write_atomic(path, content.getbuffer())
        except OSError as error:
            raise UserError(
                f"checkpoint: {str(path)!r} ({content.tell() / 2**20:.1f} MiB) could not be written "
                f"({error.strerror}); earlier checkpoints are intact: free some space and continue with --resume"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint with `read_checkpoint`, whichever way Lightning has found it.

        Raises:
            UserError: the file is missing, damaged, or not a checkpoint of this project.
        """
        if "://" in str(path) or Path(path).name == _LAUNCHERS_FILE:
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(path, mmap=False)


def read_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint of this project onto the CPU, without executing code that it may contain.

    Args:
        path: the file.
        mmap: whether tensors are read from the disk only when they are used.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"ckpt_path: there is no file {str(path)!r}; a run keeps its checkpoints in <run>/checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types for invalid files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"ckpt_path: {str(path)!r} is truncated or not a checkpoint ({reason[:80]})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "distill" not in checkpoint:
        raise UserError(
            f"ckpt_path: {str(path)!r} is not a checkpoint of distill; load plain weights with model.student.weights"
        )
    if "version" not in checkpoint["distill"]:
        raise UserError(
            f"ckpt_path: {str(path)!r} was written by distill 0.1, whose checkpoints this version cannot read; "
            "load its student's weights with model.student.weights"
        )
    return checkpoint


def latest_valid_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and content of the newest checkpoint in a folder that can be resumed; `None` if there is none.

    Unreadable checkpoints are skipped with a warning that names them, checkpoints of weights only without one. A
    checkpoint that was saved while gradients were accumulated, which it does not contain, counts only if there is no
    other.
    """
    paths = [path for path in Path(folder).glob("*.ckpt") if path.is_file()]
    inexact = None
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            rank_zero_warn(f"{str(error).removeprefix('ckpt_path: ')}: skipping it")
            continue
        if "loops" not in checkpoint or "distill_config" not in checkpoint:
            continue
        if not checkpoint.get("interrupted", {}).get("is_accumulating"):
            return path, checkpoint
        inexact = inexact or (path, checkpoint)
    return inexact
