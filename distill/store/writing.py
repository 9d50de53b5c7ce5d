"""Writing into a store's folder: files that are whole or not there, and the room for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distill.errors import UserError
from distill.files import write_atomic


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a store atomically.

    Raises:
        UserError: it cannot be written; nothing is left of it, and an old one stays.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} ({len(content) / 2**20:.1f} MiB) cannot be written ({error.strerror or error}); all files "
            "written before are intact"
        ) from error


def room(folder: str | Path) -> int:
    """Return the free bytes of the disk that holds a folder or, if it does not exist yet, will hold it."""
    path = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if os.path.exists(parent))).free
