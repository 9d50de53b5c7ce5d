"""What comparisons on the digits share: running commands, where the runs go, and a table with the spread over seeds."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

from rich.console import Console
from rich.table import Table

from distill.cli.program import DistillCLI, run

HERE = Path("experiments/digits")
LAST = Path("checkpoints/last.ckpt")


@dataclass(frozen=True)
class Row:
    """What one seed says of one model: its parameters, the test's figures, and the seconds of its training."""

    model: str
    parameters: int
    figures: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Run:
    """One model of a comparison: what `fit` is given besides seed and folder, and `test`, if that is something else."""

    model: str
    folder: str
    fit: list[str]
    test: list[str] = field(default_factory=list)


def command(*args: str) -> DistillCLI:
    """Run a `distill` command as a user would type it, and show it."""
    Console().print(f"\n[bold]$ distill {shlex.join(args)}")
    return run(list(args))


def fit_and_test(model: Run, root: Path, seed: int) -> Row:
    """Train a model in its folder of `root` and test its last epoch."""
    folder = root / model.folder
    started = perf_counter()
    command("fit", *model.fit, f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}")
    seconds = perf_counter() - started
    tested = command("test", *(model.test or model.fit), f"--ckpt_path={folder / LAST}")
    figures = {name: float(value) for name, value in tested.trainer.callback_metrics.items()}
    figures.setdefault("test/agreement", 1.0)  # tested without a teacher: it is one
    parameters = sum(parameter.numel() for parameter in tested.model.student.parameters())
    return Row(model.model, parameters, figures, seconds)


def compare(models: Callable[[Path], list[Run]], root: Path, seeds: int) -> list[list[Row]]:
    """Train and test all models for each seed from 0 on, each seed in a folder of its own if there are several.

    Args:
        models: what is compared, by the folder of the seed.
        root: a folder for all.
        seeds: how many.
    """
    root = _free(root)
    folders = [root] if seeds == 1 else [root / f"seed-{seed}" for seed in range(seeds)]
    return [[fit_and_test(model, folder, seed) for model in models(folder)] for seed, folder in enumerate(folders)]


def table_of(seeds: list[list[Row]], columns: dict[str, str]) -> Table:
    """One line a model; figures with their standard deviation if there is more than one seed.

    Args:
        seeds: for each seed the rows of all models.
        columns: headings and the names of the test's figures, shares that are shown in percent.
    """

    def spread(values: list[float], digits: int) -> str:
        shown = f"{mean(values):.{digits}f}"
        return shown if len(values) == 1 else f"{shown} ± {stdev(values):.{digits}f}"

    table = Table("model", "parameters", *columns, "seconds")
    for runs in zip(*seeds, strict=True):
        figures = [spread([100 * row.figures[name] for row in runs], 1) for name in columns.values()]
        seconds = spread([row.seconds for row in runs], 0)
        table.add_row(runs[0].model, f"{runs[0].parameters:,}", *figures, seconds)
    return table


def _free(root: Path) -> Path:
    """The folder, or a numbered one beside it if that is taken: no run is overwritten."""
    candidates = [root, *(Path(f"{root}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())
