"""Comparison of models over seeds, one run at a time with its output shown, and one table of their means."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from runner import CONSOLE, Result, Run, perform, program, split
from study_table import spread

from distill.errors import require_at_least


@dataclass(frozen=True)
class Model:
    """A row of a comparison.

    Attributes:
        name: its name in the table.
        folder: the name of its folder in that of the seed.
        fit: arguments of `distill fit`, besides seed and folder.
        test: arguments of `distill test`; those of `fit` if not given.
        figures: figures that its test cannot report, by their names.
    """

    name: str
    folder: str
    fit: tuple[str, ...]
    test: tuple[str, ...] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def run(self, root: Path, seed: int, more: Sequence[str]) -> Run:
        """Its run with a seed, in a folder of `root`, with more arguments."""
        fit = (*self.fit, f"--seed_everything={seed}", *more)
        test = None if self.test is None else (*self.test, *more)
        return Run(f"{self.name} seed {seed}", root / self.folder, fit, test)


def compare(
    models: Callable[[Path], list[Model]],
    columns: Mapping[str, str],
    root: Path,
    seeds: int,
    args: list[str],
    description: str | None,
) -> int:
    """Train and test all models for each seed, and print one table: the program of a comparison.

    Args:
        models: returns the models, given the folder of the seed.
        columns: headings, and the names of the test's figures, shares that are shown in percent.
        root: the folder of all runs, unless `--root` is given.
        seeds: the number of seeds, from 0 on, unless `--seeds` is given.
        args: the command line; what follows `--` goes to every `distill fit` and `distill test`.
        description: the program's, for its help.

    Returns:
        The exit code: 1 if a run has failed, 2 after a user's error.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, from 0 on")
    parser.add_argument("--root", type=Path, default=root, help=f"folder of all runs ({root})")
    args, more = split(args)
    given = parser.parse_args(args)

    def command() -> list[str]:
        require_at_least(1, **{"--seeds": given.seeds})
        folders = [given.root] if given.seeds == 1 else [given.root / f"seed-{seed}" for seed in range(given.seeds)]
        runs = [
            (model, model.run(folder, seed, more)) for seed, folder in enumerate(folders) for model in models(folder)
        ]
        problems = perform([run for _, run in runs], verbose=True)
        finished: dict[str, list[Result]] = {}
        for model, run in runs:
            if (result := run.result) is not None:
                result["last"] = {**model.figures, **result["last"]}
                finished.setdefault(model.name, []).append(result)
        CONSOLE.print(table(finished, columns))
        return problems

    return program(parser.prog.removesuffix(".py"), command)


def table(finished: Mapping[str, list[Result]], columns: Mapping[str, str]) -> Table:
    """Return a row per model; with several seeds, means and standard deviations.

    Args:
        finished: the result of each seed by the model's name.
        columns: headings, and the names of the test's figures.
    """
    shown = Table("model", "parameters", *columns, "seconds")
    for name, results in finished.items():
        figures = [spread([100 * result["last"][figure] for result in results], 1) for figure in columns.values()]
        seconds = spread([result["seconds"] for result in results], 0)
        shown.add_row(name, f"{results[0]['parameters']:,}", *figures, seconds)
    return shown
