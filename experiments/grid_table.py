"""Table of a grid: means, differences paired by seed with intervals, and tests corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from grid_rows import Row, Rows
from rich.table import Table
from runner import CONSOLE

CONFIDENCE = 0.95
SHOTS = {"many_shot": "many (%)", "medium_shot": "medium (%)", "few_shot": "few (%)"}
"""Headings of the figures of a long tail, which are shown if there are any."""

BASES = {"student": "the student", "kd": "KD"}
"""Methods that all others are compared with, where the grid has them."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over the seeds that both have.

    Attributes:
        mean: in percentage points.
        half: half the width of the 95 % interval of Student's t; `None` with a single seed.
        p: of the paired t-test, two-sided; `None` with a single seed.
        seeds: their number.
    """

    mean: float
    half: float | None
    p: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" if self.half is None else f"{self.mean:+.2f} ± {self.half:.2f}"


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Compare two methods seed by seed; `None` if they have no seed in common.

    Args:
        first: percentages by seed.
        second: likewise; its mean is subtracted.
    """
    from scipy import stats

    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    count = len(differences)
    if count == 1:
        return Difference(differences[0], None, None, 1)
    error = stdev(differences) / sqrt(count)
    if error == 0:
        return Difference(mean(differences), 0.0, 1.0 if differences[0] == 0 else 0.0, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean(differences)) / error, count - 1))
    return Difference(mean(differences), half, p, count)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method."""
    order = sorted(range(len(values)), key=lambda number: values[number])
    corrected, largest = [0.0] * len(values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[number]))
        corrected[number] = largest
    return corrected


def write(rows: Rows, comparisons: Sequence[tuple[str, str]], folder: Path) -> None:
    """Print the tables of a grid, and write them as `table.md` with a picture of the intervals, `intervals.png`."""
    methods = rows.methods
    if not methods:
        CONSOLE.print("no final run yet: there is no table")
        return
    over = [f"over {BASES[base]}" for base in _bases(rows)]
    header = ["method", "weight", "top-1 (%)", *over, "agreement", "calibration error", "seeds", "tuning runs"]
    shots = [name for name in SHOTS if any(getattr(row, name) is not None for row in rows)]
    header[3:3] = [SHOTS[name] for name in shots]
    lines = [_line(rows, method, shots) for method in sorted(methods, key=lambda name: -_mean(rows, name, "test"))]
    tests = _tests(rows, comparisons)
    CONSOLE.print(_shown(header, lines))
    named = ["comparison", "difference (points)", "p", "p (Holm)"]
    if tests:
        CONSOLE.print(_shown(named, tests))
    seconds = sum(row.seconds or 0.0 for row in rows)
    closing = f"{len(list(rows))} runs, {seconds / 3600:.1f} hours of training."
    text = "\n\n".join([_markdown(header, lines), *([_markdown(named, tests)] if tests else []), closing])
    (folder / "table.md").write_text(text + "\n")
    draw(rows, folder / "intervals.png")
    CONSOLE.print(f"{folder / 'table.md'}, {folder / 'intervals.png'}", highlight=False, soft_wrap=True)


def draw(rows: Rows, picture: Path) -> None:
    """Draw each method's difference to the student and to KD, seed by seed, with its interval."""
    from matplotlib.figure import Figure

    methods = sorted(rows.methods, key=lambda name: _mean(rows, name, "test"))
    bases = _bases(rows)
    figure = Figure(figsize=(1.5 + 4 * len(bases), 1.2 + 0.32 * len(methods)), layout="constrained")
    for axes, base in zip(figure.subplots(1, len(bases), sharey=True, squeeze=False)[0], bases, strict=True):
        reference = percentages(rows.final(base), "test")
        for height, method in enumerate(methods):
            top1 = percentages(rows.final(method), "test")
            difference = paired(top1, reference)
            if method == base or difference is None:
                continue
            points = [top1[seed] - reference[seed] for seed in sorted(top1.keys() & reference.keys())]
            axes.plot(points, [height] * len(points), ".", color="0.7")
            axes.errorbar(difference.mean, height, xerr=difference.half or 0, fmt="o", color="C0", capsize=3)
        axes.axvline(0, color="0.5", linestyle=":", zorder=0)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel(f"top-1 over {BASES[base]}, in points")
    figure.suptitle("differences paired by seed: seeds, mean and 95 % interval", fontsize="medium")
    figure.savefig(picture, dpi=110)


def percentages(runs: Mapping[int, Row], figure: str) -> dict[int, float]:
    """Return a figure of runs in percent, by seed."""
    found = {seed: getattr(row, figure) for seed, row in runs.items()}
    return {seed: 100 * value for seed, value in found.items() if value is not None}


def _line(rows: Rows, method: str, shots: Sequence[str]) -> list[str]:
    runs = rows.final(method)
    top1, *groups = (list(percentages(runs, name).values()) for name in ("test", *shots))
    weight = next(iter(runs.values())).weight
    differences = [
        paired(percentages(runs, "test"), percentages(rows.final(base), "test")) if method != base else None
        for base in _bases(rows)
    ]
    agreement, calibration = (percentages(runs, name) for name in ("agreement", "calibration"))
    tuning = sum(row.method == method and row.stage != "final" for row in rows)
    return [
        method,
        "" if weight is None else f"{weight:g}",
        *map(_spread, (top1, *groups)),
        *("" if difference is None else str(difference) for difference in differences),
        f"{mean(agreement.values()):.1f}" if agreement else "",
        f"{mean(calibration.values()):.1f}" if calibration else "",
        str(len(top1)),
        str(tuning),
    ]


def _bases(rows: Rows) -> list[str]:
    return [base for base in BASES if base in rows.methods]


def _spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _tests(rows: Rows, comparisons: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return a line for each comparison, with its p-value corrected for the number of comparisons."""
    found = []
    for first, second in comparisons:
        difference = paired(percentages(rows.final(first), "test"), percentages(rows.final(second), "test"))
        if difference is not None and difference.p is not None:
            found.append((f"{first} against {second}", difference, difference.p))
    corrected = holm([p for _, _, p in found])
    return [
        [name, str(difference), f"{p:.2g}", f"{adjusted:.2g}"]
        for (name, difference, p), adjusted in zip(found, corrected, strict=True)
    ]


def _mean(rows: Rows, method: str, figure: str) -> float:
    values = percentages(rows.final(method), figure).values()
    return mean(values) if values else 0.0


def _shown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def _markdown(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, marks, *lines))
