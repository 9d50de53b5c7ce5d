"""Distils a teacher into a student on scikit-learn's digits, and prints one table; `--seeds 5` gives its spread."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

from rich.console import Console
from rich.table import Table

from distill.cli import DistillCLI, run

HERE = Path("experiments/digits")
ROOT = Path("runs/digits")
LAST = Path("checkpoints/last.ckpt")


@dataclass(frozen=True)
class Row:
    """What one seed says of one model."""

    model: str
    parameters: int
    top1: float
    agreement: float
    seconds: float


def command(*args: str) -> DistillCLI:
    """Run a `distill` command as a user would type it, and show it."""
    Console().print(f"\n[bold]$ distill {shlex.join(args)}")
    return run(list(args))


def one_seed(seed: int, root: Path) -> list[Row]:
    """Train the teacher, the student alone and the distilled student, and test all three."""
    rows = []
    for model, folder in (("teacher", "teacher"), ("student alone", "student"), ("student distilled", "distill")):
        config = ("--config", str(HERE / f"{folder}.yaml"))
        extra = [] if seed == 0 else [f"--seed_everything={seed}"]
        weights = []
        if root != ROOT:
            extra.append(f"--trainer.default_root_dir={root / folder}")
            weights = [f"--model.teacher.weights={root / 'teacher' / LAST}"]
        started = perf_counter()
        command("fit", *config, *extra, *(weights if folder == "distill" else []))
        seconds = perf_counter() - started
        # the distillation's configuration knows the teacher, so that its test also tells the agreement with it
        config = config if folder == "teacher" else ("--config", str(HERE / "distill.yaml"), *weights)
        tested = command("test", *config, f"--ckpt_path={root / folder / LAST}")
        figures = tested.trainer.callback_metrics
        rows.append(
            Row(
                model,
                sum(parameter.numel() for parameter in tested.model.student.parameters()),
                100 * float(figures["test/top1"]),
                100 * float(figures.get("test/agreement", 1.0)),
                seconds,
            )
        )
    return rows


def table_of(seeds: list[list[Row]]) -> Table:
    """One line a model; figures with their standard deviation if there is more than one seed."""

    def spread(values: list[float], digits: int) -> str:
        shown = f"{mean(values):.{digits}f}"
        return shown if len(values) == 1 else f"{shown} ± {stdev(values):.{digits}f}"

    table = Table("model", "parameters", "top-1 (%)", "agreement with the teacher (%)", "seconds")
    for runs in zip(*seeds, strict=True):
        first = runs[0]
        table.add_row(
            first.model,
            f"{first.parameters:,}",
            spread([row.top1 for row in runs], 1),
            spread([row.agreement for row in runs], 1),
            spread([row.seconds for row in runs], 0),
        )
    return table


def free_root() -> Path:
    """`runs/digits`, or a numbered folder beside it if that is taken: no run is overwritten."""
    candidates = [ROOT, *(Path(f"{ROOT}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def main() -> None:
    """Run the demo."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    count = parser.parse_args().seeds
    root = free_root()
    seeds = [one_seed(seed, root if count == 1 else root / f"seed-{seed}") for seed in range(count)]
    Console().print(table_of(seeds))


if __name__ == "__main__":
    main()
