"""The reason that an exception gives, and the user's own line of code that it comes from."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import distill

_OURS = Path(distill.__file__).parent
_LIBRARY = Path(sysconfig.get_path("stdlib"))
_TELLING = (ValueError, RuntimeError, ImportError, OSError, TypeError)  # whose message is a sentence by itself
_MUTE = (ZeroDivisionError, UnicodeError, NotImplementedError, RecursionError)  # although they derive from one of these


def reason_of(error: BaseException) -> str:
    """Return an exception's own message in one line, with file and line if it comes from a module of the user."""
    text = _message(error)
    location = user_location(error)
    return f"{text} ({location[0]}, line {location[1]})" if location else text


def user_location(error: BaseException) -> tuple[str, int] | None:
    """Return file and line of the innermost frame in a module of the user: neither ours nor an installed one."""
    if isinstance(error, SyntaxError) and error.filename and is_user_file(error.filename):
        return _shown(error.filename), error.lineno or 1
    found: BaseException | None = error
    while found is not None:
        places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(found.__traceback__)]
        for file, line in reversed(places):
            if is_user_file(file):
                return _shown(file), line
        found = found.__cause__
    return None


def is_user_file(file: str) -> bool:
    """Return True if a file of Python code is neither part of this package nor installed."""
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (file.startswith("<") or installed or path.is_relative_to(_OURS) or path.is_relative_to(_LIBRARY))


def is_ours(error: BaseException) -> bool:
    """Return True if an exception was raised by a line of this package itself."""
    innermost = None
    for frame in frames(error):
        innermost = frame
    return innermost is not None and Path(innermost.f_code.co_filename).is_relative_to(_OURS)


def frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an exception passed, from the outermost to the one that raised it."""
    for frame, _ in walk_tb(error.__traceback__):
        yield frame


def argument_in(message: str, arguments: Mapping[str, Any]) -> str:
    """Return `.NAME` of the argument that a message is about, by its value and its name; empty if that is unclear."""
    plain = {name: value for name, value in arguments.items() if isinstance(value, int | float | str) or value is None}
    valued = [
        name for name, value in plain.items() if value not in (True, False, "", None) and _mentions(message, str(value))
    ]
    named = [name for name in valued or plain if _mentions(message, name)]
    found = valued if len(valued) == 1 else named
    return f".{found[0]}" if len(found) == 1 else ""


def _mentions(message: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?![\w]|\.\d)", message) is not None


def _message(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{name}: {error.msg}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror[:1].lower()}{error.strerror[1:]}: {str(error.filename)!r}"
    text = " ".join(str(error).split())
    if not text:
        return name
    if not isinstance(error, _TELLING) or isinstance(error, _MUTE):
        is_foreign = not type(error).__module__.startswith(("lightning", "distill", "torch"))
        text = f"{name}: {text}" if is_foreign else text
    return text if len(text) <= 600 else f"{text[:597]}..."


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
