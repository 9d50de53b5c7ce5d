"""Check that a run could write into its folder."""

from __future__ import annotations

import os
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


def _short(folder: Path) -> str:
    text = str(folder)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
