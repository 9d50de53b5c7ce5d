"""The table of a study: means and spreads over seeds, beside published figures, printed, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=110)
COLUMNS = ["pair", "method", "seeds", "last", "last_sd", "best", "best_sd", "over_student", "agreement", "published"]

Finished = dict[tuple[str, str], list[dict[str, Any]]]
"""By pair and method: for each seed `last`, `best` and `agreement` in percent."""

Row = dict[str, Any]
"""A value for each of `COLUMNS`; `None` where there is none."""


def published(file: Path) -> dict[tuple[str, str], float]:
    """Published top-1 (%) by pair and method."""
    if not file.exists():
        return {}
    with open(file, newline="") as lines:
        return {(row["pair"], row["method"]): float(row["top1"]) for row in csv.DictReader(lines)}


def summary(finished: Finished, figures: Mapping[tuple[str, str], float]) -> list[Row]:
    """A row for each pair and method with a result: means and standard deviations over the seeds, the best first."""
    rows = []
    for (pair, method), results in finished.items():
        row: Row = {"pair": pair, "method": method, "seeds": len(results)}
        for key in ("last", "best"):
            values = [result[key] for result in results]
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
            spread = (_spread(row[key], row[f"{key}_sd"]) for key in ("last", "best"))
            others = (_shown(row[key], form) for key, form in _FORMS.items())
            table.add_row(row["method"], *spread, *others)
        CONSOLE.print(table)
    if rows:
        draw(rows, finished, picture)
        CONSOLE.print(f"{root / 'study.csv'}, {picture}", highlight=False, soft_wrap=True)


def draw(rows: list[Row], finished: Finished, picture: Path) -> None:
    """Each method's seeds, mean and standard deviation after the last epoch, a panel for each pair."""
    from matplotlib.figure import Figure

    panels = {pair: [row for row in rows if row["pair"] == pair][::-1] for pair in (row["pair"] for row in rows)}
    tallest = max(map(len, panels.values()))
    columns = min(3, len(panels))
    lines = ceil(len(panels) / columns)
    figure = Figure(figsize=(7 * columns, lines * (1 + 0.28 * tallest)), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (pair, shown) in zip(places, panels.items(), strict=False):
        for place, row in enumerate(shown):
            seeds = [result["last"] for result in finished[pair, row["method"]]]
            axes.plot(seeds, [place] * len(seeds), ".", color="0.7")
            axes.errorbar(row["last"], place, xerr=row["last_sd"] or 0, fmt="o", color="C0", capsize=3)
            if row["published"] is not None:
                axes.plot(row["published"], place, "x", color="C1")
            if row["method"] == "student":
                axes.axvline(row["last"], color="0.5", linestyle=":", zorder=0)
        axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
        axes.set_title(pair)
        axes.set_xlabel("top-1 (%) after the last epoch: seeds, mean ± standard deviation (x: published)")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


_FORMS = {"over_student": "+.2f", "agreement": ".1f", "published": ".2f", "seeds": "d"}


def _spread(value: float, deviation: float | None) -> str:
    return f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
