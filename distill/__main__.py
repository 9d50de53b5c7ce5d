"""The program `distill`, also `python -m distill`."""

from __future__ import annotations

import sys

from distill.errors import UserError


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after a mistake of the user's, told in one sentence."""
    args = sys.argv[1:] if args is None else args
    try:
        if args[:1] == ["export"]:
            from distill.cli.export import run_export

            run_export(args[1:])
        elif args[:1] == ["probe"]:
            from distill.cli.probe import run_probe

            run_probe(args[1:])
        else:
            from distill.cli.program import run

            run(args)
    except UserError as error:
        print(f"distill: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: UserError) -> str:
    """What is wrong; an error of a data worker's comes with the worker's traceback before it."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].rstrip() if "\n" in text else text


if __name__ == "__main__":
    sys.exit(main())
