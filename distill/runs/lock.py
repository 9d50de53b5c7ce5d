"""Locks on folders, so that two processes do not write into the same one."""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # as its users import them
    rank_zero_info,
    rank_zero_warn,
)

LOCK = "run.lock"
"""Name of the lock file within a locked folder; it is removed when the lock is released, but not by a kill."""

_held: set[tuple[int, int]] = set()  # device and inode; a process is not kept out by its own locks


class FolderIsLockedError(Exception):
    """A folder is locked by another run; the message names its process."""


class FolderLock:
    """Exclusive lock on a folder, held by this process until `release` or the process's end, however it ends.

    The lock is a POSIX record lock on a file in the folder. Unlike the locks of `flock`, it belongs to this process
    alone: data workers do not inherit it, so that a killed process's folder is free although its workers live on. Such
    a lock is lost as soon as the process closes any descriptor of the file, so nothing else may open the file.

    On a file system without locks, the folder is used without one, with a warning.

    Args:
        folder: an existing folder.
        wait: seconds to wait for the end of another process's lock.

    Raises:
        FolderIsLockedError: another process still holds the lock after that time.
        OSError: the lock file cannot be created.
    """

    def __init__(self, folder: Path, wait: float = 0.0) -> None:
        self.path = folder / LOCK
        self._process = os.getpid()
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None
        deadline = time.monotonic() + wait
        is_announced = False
        while not self._acquire():
            if time.monotonic() >= deadline:
                raise FolderIsLockedError(self._holder())
            if not is_announced:
                is_announced = True
                rank_zero_info(f"{str(folder)!r} is in use by {self._holder()}: waiting {wait:g} seconds for its end")
            time.sleep(0.1)

    def release(self) -> None:
        """Remove the lock file and the lock; a second call, or one in a fork of the process, does nothing."""
        if self._descriptor is not None and self._process == os.getpid():
            self.path.unlink(missing_ok=True)  # while the lock is held, so that it is no other process's file
            os.close(self._descriptor)
        if self._identity is not None:
            _held.discard(self._identity)
        self._descriptor = self._identity = None

    def _acquire(self) -> bool:
        """Try to lock the file once."""
        if _identity(self.path) in _held:
            return False  # without opening it, which would end the lock
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_locked = _lock(descriptor, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        if not is_locked:
            os.close(descriptor)
            return False
        status = os.fstat(descriptor)
        if _identity(self.path) != (status.st_dev, status.st_ino):  # the last holder has just removed the file
            os.close(descriptor)
            return self._acquire()
        with suppress(OSError):  # on a full disk, the lock alone has to do
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor, self._identity = descriptor, (status.st_dev, status.st_ino)
        _held.add(self._identity)
        return True

    def _holder(self) -> str:
        """Describe the process that holds the lock."""
        if _identity(self.path) in _held:
            return "this process"
        try:
            return self.path.read_text() or "another process"
        except OSError:
            return "another process"


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file; return False if another process has locked it, True also if it cannot be locked at all."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        reason = getattr(error, "strerror", None) or error
        rank_zero_warn(
            f"the file system of {str(path.parent)!r} has no locks ({reason}), so another run that is started in this "
            "folder at the same time goes unnoticed"
        )
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, or `None` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
