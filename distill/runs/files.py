"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PART = ".part"
"""What the name of a file ends with while it is being written."""


def write_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file so that at any moment, after a power cut too, the old one or the new one is there whole.

    The bytes go to `<path>.part` in the same folder, onto the disk, and then take the name in one step.

    Args:
        path: the file; its folder is made if need be.
        data: its content.

    Raises:
        OSError: they cannot be written; what was there before is untouched, and nothing half-written stays.
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
    with suppress(OSError):  # not every file system can; the name then comes with its next write
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
