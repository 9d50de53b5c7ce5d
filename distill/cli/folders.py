"""Check that a run could write into its folder, and a command its file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import UserError


def refuse_unwritable(folder: Path, key: str) -> None:
    """Refuse a folder that cannot be made or written to, without making it.

    Args:
        folder: the folder of the run.
        key: the configuration key that it comes from.

    Raises:
        UserError: a part of the path is a file, or may not be written to.
    """
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        is_folder = existing.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{key}: {_short(folder)} cannot be used: {error.strerror}") from error
    except ValueError as error:  # a null character
        raise UserError(f"{key}: {_short(folder)} is no path: {error}") from error
    if not is_folder:
        what = "is a file" if existing == folder else f"cannot be made, since {str(existing)!r} is a file"
        raise UserError(f"{key}: {_short(folder)} {what}: give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {_short(folder)} cannot be written to: permission denied for {str(existing)!r}")


def refuse_output(output: str) -> None:
    """Refuse a file to write, the option `output`, that exists or cannot lie where it should.

    Raises:
        UserError: there is a file already, or its folder cannot be made or written to.
    """
    path = Path(output)
    refuse_unwritable(path.parent, "output")
    try:
        exists = path.exists() or path.is_symlink()
    except OSError as error:  # a name that is too long
        raise UserError(f"output: {_short(path)} cannot be used: {error.strerror}") from error
    if exists:
        raise UserError(f"output: {output!r} already exists and is not overwritten; give another file")


@contextmanager
def writing(output: str) -> Iterator[None]:
    """Context that writes the file of the option `output`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"output: {_short(Path(output))} cannot be written: {error.strerror or error}") from error


def _short(folder: Path) -> str:
    text = str(folder)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
