"""Comparison of methods: the weight of each is tuned, then all methods run with the same seeds.

    python experiments/grid.py fashion_mnist/cnn --jobs 2

A grid is a folder in `experiments/` with `grid.yaml` (see `Plan`), `recipe.yaml`, and `methods/` in it or beside it. In
three stages, the student's learning rate is tuned, and used by all; then each method's weight; then every method runs
with all seeds, and only these runs are tested, once, after their last epoch. The teacher runs once, for all of them:
its answers to all draws of all images are stored.

Every finished run is a row of `runs.csv`, and what has a row is not run again, on any machine: a grid may be continued
at any time, by the same command. What follows `--` goes to every `distill fit`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from grid_rows import Row, Rows, digest
from grid_table import write
from runner import CONSOLE, Result, Run, perform, program, split

from distill.errors import UserError, require_at_least

HERE = Path(__file__).resolve().parent
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
LEARNING_RATE = "model.optimizer.lr"
STUDENT = "student"


@dataclass(frozen=True)
class Method:
    """A row of the table: the student alone, or with one or several terms.

    Attributes:
        name: in the table.
        terms: names of its terms, each with a file `methods/TERM.yaml`; the last one's weight is tuned, and the others
            keep the weights that were tuned for them alone. The student has none. A file without a head has no weight
            and changes other keys, such as `model.task`.
        weights: those that are tried.
    """

    name: str
    terms: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The content of `grid.yaml`.

    Attributes:
        tuning_seed: the seed of all runs that tune; it is not used again.
        seeds: of the comparison.
        learning_rates: those that are tried on the student.
        methods: by name, with `weights` and, unless a method has its own name as only term, `terms`.
        comparisons: pairs of methods whose difference is tested, named before the first run.
    """

    tuning_seed: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    methods: Mapping[str, Method]
    comparisons: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read the plan of a grid.

        Raises:
            UserError: there is none, or it names a method that it does not have.
        """
        file = folder / "grid.yaml"
        if not file.exists():
            known = sorted(str(each.parent.relative_to(HERE)) for each in HERE.glob("**/grid.yaml"))
            raise UserError(f"{str(folder)!r} is no grid: it has no grid.yaml; there are {', '.join(known)}")
        content = yaml.safe_load(file.read_text())
        methods = {
            name: Method(
                name,
                tuple(given.get("terms", [] if name == STUDENT else [name])),
                tuple(map(float, given.get("weights", []))),
            )
            for name, given in content.pop("methods").items()
        }
        plan = cls(
            content["tuning_seed"],
            tuple(content["seeds"]),
            tuple(map(float, content["learning_rates"])),
            methods,
            tuple((first, second) for first, second in content.get("comparisons", [])),
        )
        if plan.tuning_seed in plan.seeds:
            raise UserError(f"{file}: seed {plan.tuning_seed} is used for tuning, so it cannot be one of seeds")
        for name in [*(name for pair in plan.comparisons for name in pair), STUDENT]:
            if name not in methods:
                raise UserError(f"{file}: there is no method {name!r} among {', '.join(methods)}")
        return plan


@dataclass(frozen=True)
class Grid:
    """A grid with its folders.

    Attributes:
        name: of the grid.
        folder: with its files.
        root: of its runs and its store.
        plan: of its runs.
        rows: of the runs that are finished.
        more: arguments for every run.
    """

    name: str
    folder: Path
    root: Path
    plan: Plan
    rows: Rows
    more: tuple[str, ...] = ()

    @property
    def store(self) -> Path:
        """Folder of the teacher's answers."""
        return self.root / "store"

    def file(self, name: str) -> Path:
        """Return a configuration in the grid's folder or in the one above it.

        Raises:
            UserError: there is none.
        """
        for folder in (self.folder, self.folder.parent):
            if (folder / name).exists():
                return folder / name
        raise UserError(f"{self.folder}: there is no {name}, in the grid's folder or beside it")

    def configs(self, method: Method) -> list[Path]:
        """Return the configurations of a method, the recipe first."""
        return [self.file("recipe.yaml"), *(self.file(f"methods/{term}.yaml") for term in method.terms)]

    def arguments(self, method: Method) -> list[str]:
        """Return the arguments that say a method: the recipe, its terms, and what else its files say."""
        recipe, *files = self.configs(method)
        heads = self.heads(method)
        parts = [recipe, *(file for file in files if file.stem not in heads)]
        # Of two files with heads, the second would replace those of the first.
        terms = (f"--model.heads.{term}={json.dumps(content)}" for term, content in heads.items())
        return [*(f"--config={part}" for part in parts), *terms]

    def heads(self, method: Method) -> dict[str, Any]:
        """Return the terms of a method that are heads, with their configurations.

        Raises:
            UserError: a file has heads, but not the one that it is named after alone.
        """
        found: dict[str, Any] = {}
        for term, file in zip(method.terms, self.configs(method)[1:], strict=True):
            heads = yaml.safe_load(file.read_text())["model"].get("heads", {})
            if heads.keys() - {term}:
                raise UserError(f"{file}: a term's file has one head of its name, {term}, and not {', '.join(heads)}")
            found |= heads
        return found

    def run(self, method: Method, stage: str, seed: int, rate: float, weight: float | None) -> Run:
        """Return a run of a method."""
        heads = self.heads(method)
        weights = self.other_weights(method)
        if weight is not None:
            weights[method.terms[-1]] = weight
        stored = "--model.teacher=StoredTeacher", f"--model.teacher.path={self.store}"
        teacher = stored if heads else ("--model.teacher=null",)
        arguments = (
            *self.arguments(method),
            *teacher,
            *(f"--model.heads.{term}.weight={value:g}" for term, value in weights.items()),
            f"--{LEARNING_RATE}={rate:g}",
            f"--seed_everything={seed}",
            *QUIET,
            *self.more,
        )
        given = f"lr-{rate:g}" if weight is None else f"lr-{rate:g}-weight-{weight:g}"
        folder = self.root / stage / method.name / given / f"seed-{seed}"
        tested = ("last",) if stage == "final" else ()
        name = f"{method.name} {given} seed {seed}"
        return Run(name, folder, arguments, (*arguments, "--trainer.logger=false"), tested)

    @property
    def learning_rate(self) -> float | None:
        """The learning rate with which the student validated best; `None` as long as none is tuned."""
        best = self.rows.best("learning rate", STUDENT)
        return None if best is None else best.learning_rate

    def tuned_weight(self, method: Method) -> float | None:
        """Return the weight of a method that validated best; `None` for a method without weight."""
        settings = {"learning_rate": self.learning_rate, "others": _listed(self.other_weights(method))}
        best = self.rows.best("weight", method.name, **settings)
        return None if best is None else best.weight

    def other_weights(self, method: Method) -> dict[str, float | None]:
        """Return the tuned weights of a method's terms but the last, by name; a term without a head has none."""
        heads = self.heads(method) if len(method.terms) > 1 else {}
        return {term: self.tuned_weight(Method(term, (term,))) for term in method.terms[:-1] if term in heads}

    def perform(self, stage: str, runs: Mapping[Row, Run], jobs: int) -> list[str]:
        """Finish the runs without a row, and add their rows."""
        todo = {run.folder: row for row, run in runs.items() if row not in self.rows}
        CONSOLE.print(f"{self.name}, {stage}: {len(runs) - len(todo)} of {len(runs)} runs have a row", highlight=False)

        def finished(run: Run, result: Result) -> None:
            self.rows.add(todo[run.folder].of(result))

        wanted = [run for row, run in runs.items() if row not in self.rows]
        for run in wanted:
            if (result := run.result) is not None:  # finished, but killed before its row was written
                finished(run, result)
        return perform([run for run in wanted if run.result is None], jobs, finished=finished)


def main(args: list[str]) -> int:
    """Run a grid; return 1 if a run has failed, 2 after a user's error."""
    args, more = split(args)
    given = _parser().parse_args(args)
    return program("grid", lambda: run_grid(given, more))


def run_grid(given: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """Finish all stages of a grid, and write its table.

    Raises:
        UserError: there is no such grid, its recipe has changed since its first run, or the teacher cannot be stored.
    """
    require_at_least(1, **{"--jobs": given.jobs})
    folder = (HERE / given.grid).resolve()
    plan = Plan.read(folder)
    root = given.root or Path("runs") / given.grid
    grid = Grid(given.grid, folder, root, plan, Rows(folder / "runs.csv"), tuple(more))
    recipes = {name: digest(grid.configs(method), more) for name, method in plan.methods.items()}
    grid.rows.require_recipes(recipes)
    if not given.table and (problems := _stages(grid, recipes, given.jobs)):
        return problems
    write(grid.rows, plan.comparisons, folder)
    return []


def _stages(grid: Grid, recipes: Mapping[str, str], jobs: int) -> list[str]:
    plan = grid.plan
    student = plan.methods[STUDENT]

    def row(stage: str, name: str, seed: int, rate: float, weight: float | None) -> Row:
        return Row(stage, name, seed, rate, weight, recipes[name], _listed(grid.other_weights(plan.methods[name])))

    _store(grid)
    runs = {
        row("learning rate", STUDENT, plan.tuning_seed, rate, None): grid.run(
            student, "learning-rate", plan.tuning_seed, rate, None
        )
        for rate in plan.learning_rates
    }
    if problems := grid.perform("learning rate", runs, jobs):
        return problems
    rate = grid.learning_rate
    assert rate is not None
    for count in sorted({len(method.terms) for method in plan.methods.values() if method.weights}):
        runs = {
            row("weight", method.name, plan.tuning_seed, rate, weight): grid.run(
                method, "weight", plan.tuning_seed, rate, weight
            )
            for method in plan.methods.values()
            for weight in method.weights
            if len(method.terms) == count
        }
        if problems := grid.perform("weights", runs, jobs):
            return problems
    runs = {}
    for seed in plan.seeds:  # the outermost, so that a grid that is stopped has all methods, with fewer seeds
        for method in plan.methods.values():
            weight = grid.tuned_weight(method)
            runs[row("final", method.name, seed, rate, weight)] = grid.run(method, "final", seed, rate, weight)
    return grid.perform("final", runs, jobs)


def _listed(weights: Mapping[str, float | None]) -> str:
    return " ".join(f"{term}={weight:g}" for term, weight in weights.items() if weight is not None)


def _store(grid: Grid) -> None:
    """Store the teacher's answers for all methods; what is there already is kept.

    Raises:
        UserError: that failed.
    """
    terms = dict.fromkeys(term for method in grid.plan.methods.values() for term in method.terms)
    everything = Method("all", tuple(terms))
    command: list[Any] = [sys.executable, "-m", "distill", "store", f"--output={grid.store}"]
    command += [*grid.arguments(everything), "--splits=[train,val,test]", *grid.more]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError("the teacher's answers could not be stored, see above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="name of the folder, such as fashion_mnist/cnn")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--root", type=Path, help="folder of all runs; runs/GRID if not given")
    parser.add_argument("--table", action="store_true", help="only write the table of the rows that are there")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
