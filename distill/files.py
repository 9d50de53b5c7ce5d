"""Atomic file writes."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

PART = ".part"
"""Suffix of a file that is still being written."""


def write_atomic(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file atomically, so that even a power failure leaves either the old or the new content.

    The data are written to `<path>.<host>-<process>.part` in the same folder, flushed to disk and then renamed; of
    several processes that write the same file, the last one wins. Partial files of the same path that killed processes
    of this host have left are removed.

    Args:
        path: the file; its folder is created if needed.
        data: the new content.

    Raises:
        OSError: the file cannot be written; an existing file stays as it is, and the partial file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{_host()}-{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:  # an interrupt, too
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # what is left of others is no failure of this write
        _remove_leftovers(path)
    with suppress(OSError):  # not every file system can flush a folder; the rename then reaches the disk later
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())


def _remove_leftovers(path: Path) -> None:
    """Remove the partial files of `path` whose processes ran on this host and have ended."""
    name = re.compile(re.escape(f"{path.name}.{_host()}-") + r"(\d{1,9})" + re.escape(PART))
    for entry in os.listdir(path.parent):
        if (found := name.fullmatch(entry)) and not _is_running(int(found[1])):
            path.with_name(entry).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere, the question itself would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True
