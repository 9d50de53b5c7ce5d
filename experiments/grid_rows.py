"""Rows of `runs.csv`: one per finished run of a grid."""

from __future__ import annotations

import csv
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from runner import Result

from distill.errors import UserError
from distill.files import write_atomic


@dataclass(frozen=True)
class Row:
    """A run of a grid, with its figures once it is finished.

    Attributes:
        stage: `learning rate`, `weight` or `final`.
        method: name of the method.
        seed: of the run.
        learning_rate: of the run.
        weight: of the method's last term, `None` for the student.
        recipe: digest of the configurations behind it, and of further arguments that change its figures.
        others: weights of the method's other terms, which were tuned before, such as `kd=5.4`.
        validation: top-1 of the last validation, a share.
        test: top-1 of the test after the last epoch, a share; only of final runs.
        agreement: share of the test images for which student and teacher give the same class.
        calibration: expected calibration error of the test.
        many_shot: top-1 of the test for the classes with many training images, a share; only of a long tail.
        medium_shot: likewise, for those in between.
        few_shot: likewise, for those with few.
        seconds: of the training.
    """

    stage: str
    method: str
    seed: int
    learning_rate: float
    weight: float | None
    recipe: str
    others: str = ""
    validation: float | None = field(default=None, compare=False)
    test: float | None = field(default=None, compare=False)
    agreement: float | None = field(default=None, compare=False)
    calibration: float | None = field(default=None, compare=False)
    many_shot: float | None = field(default=None, compare=False)
    medium_shot: float | None = field(default=None, compare=False)
    few_shot: float | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)

    def of(self, result: Result) -> Row:
        """Return the row with the figures of a result."""
        tested = result.get("last", {})
        return replace(
            self,
            validation=_rounded(result["validation"].get("val/top1")),
            test=_rounded(tested.get("test/top1")),
            agreement=_rounded(tested.get("test/agreement")),
            calibration=_rounded(tested.get("test/calibration_error")),
            many_shot=_rounded(tested.get("test/many")),
            medium_shot=_rounded(tested.get("test/medium")),
            few_shot=_rounded(tested.get("test/few")),
            seconds=round(result["seconds"], 1),
        )


_FIGURES = [item.name for item in fields(Row) if not item.compare]


class Rows:
    """The rows in a file, which several processes may add to.

    Args:
        file: `runs.csv`; it need not exist.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: dict[Row, Row] = {}
        self._read()

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def add(self, row: Row) -> None:
        """Add a row to those in the file, which other processes may have added to."""
        with _alone_in(self.file.parent), StringIO(newline="") as text:
            self._read()
            self._rows[row] = row
            writer = csv.DictWriter(text, [item.name for item in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(_written, self))
            write_atomic(self.file, text.getvalue().encode())

    def _read(self) -> None:
        if not self.file.exists():
            return
        with self.file.open(newline="") as lines:
            for number, values in enumerate(csv.DictReader(lines), start=2):
                try:
                    row = _parsed(values)
                except (TypeError, ValueError, KeyError) as error:
                    raise UserError(f"{self.file}: line {number} is no row of a grid ({error})") from None
                self._rows[row] = row

    def best(self, stage: str, method: str, **settings: object) -> Row | None:
        """Return the row with the best validation of a method, the first of several; `None` without one.

        Args:
            stage: of the row.
            method: of the row.
            settings: values that its other fields have.
        """
        wanted = {"stage": stage, "method": method, **settings}
        rows = [row for row in self if row.validation is not None and vars(row) | wanted == vars(row)]
        return max(rows, key=lambda row: row.validation or 0.0, default=None)

    def final(self, method: str) -> dict[int, Row]:
        """Return the final runs of a method by seed, those with the settings of the last: earlier ones were retuned."""
        rows = [row for row in self if row.stage == "final" and row.method == method]
        return {row.seed: row for row in rows if _settings(row) == _settings(rows[-1])}

    @property
    def methods(self) -> list[str]:
        """The methods with final runs, in the order of their first."""
        return list(dict.fromkeys(row.method for row in self if row.stage == "final"))

    def require_recipes(self, recipes: Mapping[str, str]) -> None:
        """Require that the configurations of all methods are those of their rows.

        Raises:
            UserError: those of a method have changed.
        """
        changed = [row.method for row in self if row.method in recipes and row.recipe != recipes[row.method]]
        if changed:
            raise UserError(
                f"{self.file}: the configurations of {', '.join(dict.fromkeys(changed))} have changed since "
                f"{len(changed)} of its runs: put them back, or remove these rows to run them again"
            )


def digest(files: Sequence[Path], arguments: Sequence[str] = ()) -> str:
    """Return 12 hexadecimal digits that depend on what a run does.

    Args:
        files: its configurations, whose comments and layout do not count.
        arguments: of the command line beside them; those that say where it runs do not count.
    """
    contents = [yaml.safe_load(file.read_text()) for file in files]
    words = " ".join(arguments).replace(" --", "\n--").splitlines()
    given = [word for word in words if word.lstrip("-").replace(" ", "=").split("=")[0] not in _WHERE]
    return sha256(json.dumps([*contents, *given], sort_keys=True).encode()).hexdigest()[:12]


_WHERE = {
    *("trainer.accelerator", "trainer.devices", "data.root", "data.init_args.root"),
    *("data.num_workers", "data.init_args.num_workers"),
}
"""Keys that change no figure but by rounding."""


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is within this context for the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _settings(row: Row) -> tuple[object, ...]:
    return row.learning_rate, row.weight, row.others


def _parsed(values: Mapping[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(values[name]) if values[name] else None

    rate = number("learning_rate")
    if rate is None:
        raise ValueError("it has no learning_rate")
    figures: dict[str, Any] = {name: number(name) for name in _FIGURES if name in values}  # fewer in an older file
    row = Row(values["stage"], values["method"], int(values["seed"]), rate, number("weight"), values["recipe"])
    return replace(row, others=values.get("others") or "", **figures)


def _written(row: Row) -> dict[str, object]:
    return {name: "" if value is None else value for name, value in asdict(row).items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)
