"""Rows of `runs.csv`: one per finished run of a grid."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from io import StringIO
from pathlib import Path

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
        recipe: digest of the configurations behind it.
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
    """The rows in a file, which is appended to.

    Args:
        file: `runs.csv`; it need not exist.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: dict[Row, Row] = {}
        self._columns: Sequence[str] = ()
        if file.exists():
            with file.open(newline="") as lines:
                reader = csv.DictReader(lines)
                self._columns = list(reader.fieldnames or ())
                for number, values in enumerate(reader, start=2):
                    try:
                        row = _parsed(values)
                    except (TypeError, ValueError, KeyError) as error:
                        raise UserError(f"{file}: line {number} is no row of a grid ({error})") from None
                    self._rows[row] = row

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def add(self, row: Row) -> None:
        """Append a row to the file, which is written anew if it does not exist or lacks a column."""
        names = [item.name for item in fields(Row)]
        self._rows[row] = row
        with StringIO(newline="") as text:
            writer = csv.DictWriter(text, names, lineterminator="\n")
            if self._columns != names:
                self._columns = names
                writer.writeheader()
                writer.writerows(map(_written, self))
                write_atomic(self.file, text.getvalue().encode())
                return
            writer.writerow(_written(row))
            with self.file.open("a", newline="") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())

    def best(self, stage: str, method: str) -> Row | None:
        """Return the row of a stage with the best validation of a method, the first of several; `None` without one."""
        rows = [row for row in self if row.stage == stage and row.method == method and row.validation is not None]
        return max(rows, key=lambda row: row.validation or 0.0, default=None)

    def final(self, method: str) -> dict[int, Row]:
        """Return the final runs of a method, by seed."""
        return {row.seed: row for row in self if row.stage == "final" and row.method == method}

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


def digest(files: Sequence[Path]) -> str:
    """Return 12 hexadecimal digits that depend on the content of configurations, not on comments or layout."""
    contents = [yaml.safe_load(file.read_text()) for file in files]
    return sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]


def _parsed(values: Mapping[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(values[name]) if values[name] else None

    rate = number("learning_rate")
    if rate is None:
        raise ValueError("it has no learning_rate")
    figures = {name: number(name) for name in _FIGURES if name in values}  # an older file has fewer columns
    return Row(
        values["stage"], values["method"], int(values["seed"]), rate, number("weight"), values["recipe"], **figures
    )


def _written(row: Row) -> dict[str, object]:
    return {name: "" if value is None else value for name, value in asdict(row).items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)
