"""Run the parts one after another, and list the bounds with what was measured.

    python experiments/benchmarks
    python experiments/benchmarks --device cuda
    python experiments/benchmarks --only step heads

The output is written to `runs/benchmark.txt` too, after each part.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from time import perf_counter

from timing import CONSOLE, Bound, given_run, print_machine, show_bounds

PARTS = [
    *("step", "heads", "kernels", "superpixels", "teacher", "data", "scaling", "checkpoint", "startup", "shares"),
    *("store", "scale", "ranks", "overhead", "compilation"),
]
"""Parts in the order of their numbers, each a file with a function `measure(run)` that prints and returns bounds."""


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark.txt"), help="file for the tables")
    run, given = given_run(parser)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    print_machine(run.device)
    bounds: list[Bound] = []
    failed: list[str] = []
    for number, part in enumerate(PARTS, 1):
        if part not in given.only:
            continue
        CONSOLE.rule(f"{number} {part}", align="left")
        started = perf_counter()
        try:
            bounds += import_module(part).measure(run)
        except Exception as error:  # the other parts still run
            CONSOLE.print(f"{part} failed: {type(error).__name__}: {error}", markup=False)
            failed.append(part)
        CONSOLE.print(f"({part}: {perf_counter() - started:.0f} s)")
        CONSOLE.save_text(str(given.output), clear=False)
    show_bounds(bounds)
    CONSOLE.save_text(str(given.output))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
