"""Table of a study: means and spreads over seeds, beside published figures, printed, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypedDict

from rich.table import Table
from runner import CONSOLE, Result

COLUMNS = ["pair", "method", "seeds", "last", "last_sd", "best", "best_sd", "over_student", "agreement", "published"]


class Scores(TypedDict):
    """Test figures of one run in percent: top-1 of the last and the best epoch, the last's agreement if it has one."""

    last: float
    best: float
    agreement: float | None


Finished = dict[tuple[str, str], list[Scores]]
"""The scores of each seed by pair and method."""

Row = dict[str, Any]
"""A value for each of `COLUMNS`, or `None`."""


def scores(result: Result) -> Scores:
    """Return what the table takes from the result of a run."""
    last, best = result["last"], result["best"]
    agreement = 100 * last["test/agreement"] if "test/agreement" in last else None
    return {"last": 100 * last["test/top1"], "best": 100 * best["test/top1"], "agreement": agreement}


def published(file: Path) -> dict[tuple[str, str], float]:
    """Read published top-1 (%) by pair and method."""
    if not file.exists():
        return {}
    with open(file, newline="") as lines:
        return {(row["pair"], row["method"]): float(row["top1"]) for row in csv.DictReader(lines)}


def summary(finished: Finished, figures: Mapping[tuple[str, str], float]) -> list[Row]:
    """Return a row per pair and method with a result: means and standard deviations over the seeds, the best first."""
    rows = []
    for (pair, method), results in finished.items():
        row: Row = {"pair": pair, "method": method, "seeds": len(results)}
        for key, values in (
            ("last", [result["last"] for result in results]),
            ("best", [result["best"] for result in results]),
        ):
            row[key] = mean(values)
            row[f"{key}_sd"] = stdev(values) if len(values) > 1 else None
        alone = finished.get((pair, "student"))
        if alone and method != "student":
            row["over_student"] = row["last"] - mean(result["last"] for result in alone)
        agreements = [result["agreement"] for result in results if result["agreement"] is not None]
        row["agreement"] = mean(agreements) if agreements else None
        row["published"] = figures.get((pair, method))
        rows.append({column: row.get(column) for column in COLUMNS})
    return sorted(rows, key=lambda row: (row["pair"], -row["last"]))


def write(rows: list[Row], finished: Finished, root: Path, picture: Path) -> None:
    """Print the table, and write it as `study.csv`, with a picture."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "study.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for pair in dict.fromkeys(row["pair"] for row in rows):
        table = Table("method", title=f"{pair}: top-1 (%) on the test images", title_justify="left")
        for column in ("last epoch", "best epoch", "over the student", "agreement", "published", "seeds"):
            table.add_column(column, justify="right")
        for row in (row for row in rows if row["pair"] == pair):
            figures = (with_deviation(row[key], row[f"{key}_sd"], 2) for key in ("last", "best"))
            rest = ("" if row[key] is None else format(row[key], form) for key, form in _FORMS.items())
            table.add_row(row["method"], *figures, *rest)
        CONSOLE.print(table)
    if rows:
        draw(rows, finished, picture)
        CONSOLE.print(f"{root / 'study.csv'}, {picture}", highlight=False, soft_wrap=True)


def draw(rows: list[Row], finished: Finished, picture: Path) -> None:
    """Draw each method's seeds, mean and standard deviation after the last epoch, a panel per pair."""
    from matplotlib.figure import Figure

    panels = {pair: [row for row in rows if row["pair"] == pair][::-1] for pair in (row["pair"] for row in rows)}
    tallest = max(map(len, panels.values()))
    columns = min(3, len(panels))
    lines = ceil(len(panels) / columns)
    figure = Figure(figsize=(7 * columns, lines * (1 + 0.28 * tallest)), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (pair, shown) in zip(all_axes, panels.items(), strict=False):
        for height, row in enumerate(shown):
            seeds = [result["last"] for result in finished[pair, row["method"]]]
            axes.plot(seeds, [height] * len(seeds), ".", color="0.7")
            axes.errorbar(row["last"], height, xerr=row["last_sd"] or 0, fmt="o", color="C0", capsize=3)
            if row["published"] is not None:
                axes.plot(row["published"], height, "x", color="C1")
            if row["method"] == "student":
                axes.axvline(row["last"], color="0.5", linestyle=":", zorder=0)
        axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
        axes.set_title(pair)
        axes.set_xlabel("top-1 (%) after the last epoch: seeds, mean ± standard deviation (x: published)")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and with several values their standard deviation."""
    return with_deviation(mean(values), stdev(values) if len(values) > 1 else None, digits)


def with_deviation(value: float, deviation: float | None, digits: int) -> str:
    """Return a mean with its standard deviation if there is one."""
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


_FORMS = {"over_student": "+.2f", "agreement": ".1f", "published": ".2f", "seeds": "d"}
