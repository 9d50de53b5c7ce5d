"""Atomic file writes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PART = ".part"
"""Suffix of a file that is still being written."""


def write_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file atomically, so that even a power failure leaves either the old or the new content.

    The data are written to `<path>.part` in the same folder, flushed to disk and then renamed.

    Args:
        path: the file; its folder is created if needed.
        data: the new content.

    Raises:
        OSError: the file cannot be written; an existing file stays as it is, and the partial file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can flush a folder; the rename then reaches the disk later
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
