"""Checkpoints that are whole or not there: writing them, reading them, finding the newest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it

from distill.errors import UserError
from distill.runs.files import write_atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is on the disk.

    (Lightning's writes to the temporary folder and copies where that is on another disk.) Paths with a protocol, as
    `s3://`, are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it.

        Raises:
            UserError: the disk is full, or refuses for another reason; checkpoints that are there stay.
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
                f"({error.strerror}), what was saved before is whole: make room and go on with --resume"
            ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a run of this project, on the CPU.

    Raises:
        UserError: it is missing, broken, or of something else.
    """
    if not Path(path).is_file():
        raise UserError(f"ckpt_path: there is no file {str(path)!r}; a run keeps its checkpoints in <run>/checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"ckpt_path: {str(path)!r} is cut short or no checkpoint ({reason[:80]})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "distill" not in checkpoint:
        raise UserError(
            f"ckpt_path: {str(path)!r} holds no run of distill; weights alone are loaded with model.student.weights"
        )
    if "version" not in checkpoint["distill"]:
        raise UserError(
            f"ckpt_path: {str(path)!r} was written by distill 0.1, whose checkpoints this version does not read; "
            "give its student's weights alone as model.student.weights"
        )
    return checkpoint


def latest_valid_checkpoint(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a folder that training can go on from, and its content; `None` if there is none.

    One that cannot be read is passed over with a warning that names it; one of weights alone is passed over.
    """
    paths = [path for path in Path(folder).glob("*.ckpt") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            rank_zero_warn(f"{str(error).removeprefix('ckpt_path: ')}: it is passed over")
            continue
        if "loops" in checkpoint and "distill_config" in checkpoint:
            return path, checkpoint
    return None
