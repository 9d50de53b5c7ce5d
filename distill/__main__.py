"""Entry point of the `distill` program and of `python -m distill`."""

from __future__ import annotations

import os
import sys
from traceback import print_exception

from distill import __version__
from distill.cli.commands import COMMANDS, help_text
from distill.errors import ConstructionError, UserError, did_you_mean

DEBUG = "DISTILL_DEBUG"
"""Environment variable; 1 shows the traceback of a user error."""


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 2 after a user error, which is printed as one sentence.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        if name in ("--help", "-h", "help"):
            print(help_text())
        elif name in ("--version", "version"):
            print(f"distill {__version__}")
        elif name not in COMMANDS:
            kind = "option" if name.startswith("-") else "command"
            raise UserError(f"there is no {kind} {name!r}: {did_you_mean(name, [*COMMANDS, '--help'])}")
        else:
            COMMANDS[name].run(name, rest)
    except UserError as error:
        debug = os.environ.get(DEBUG, "") not in ("", "0")
        if debug:
            print_exception(error)
        print(f"distill: {_sentence(error)}", file=sys.stderr)
        if isinstance(error, ConstructionError) and not debug:
            print(f"({DEBUG}=1 shows the traceback)", file=sys.stderr)
        return 2
    return 0


def _sentence(error: UserError) -> str:
    """Return the error message without the traceback that a data worker prepends."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].rstrip() if "\n" in text else text


if __name__ == "__main__":
    sys.exit(main())
