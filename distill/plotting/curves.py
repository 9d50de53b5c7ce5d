"""Curves of one or several runs, in small panels side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""

WIDTH, HEIGHT = 2.6, 1.15
"""Of a panel, in inches."""
LEFT, GAP, BELOW, TITLE = 1.5, 0.62, 0.45, 0.5
"""In inches: the margin for the rows' titles, between columns, below a section and above its first row."""
MANY = 200
"""Number of points from which a curve is drawn faintly, under its running mean over a fiftieth of its points."""


@dataclass(frozen=True)
class Section:
    """Rows of panels that share a title.

    Attributes:
        title: title of the section.
        columns: title of each column; empty if each panel has its own.
        rows: title of each row, and its panels: curves by run, a title, or `None` for an empty place.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, Curve]] | None]]]


def draw_sections(
    sections: Sequence[Section], runs: Sequence[str], matrix: Mapping[str, Mapping[str, float]] | None = None
) -> Figure:
    """Draw sections one below the other, each run in one color.

    Panels have their own vertical axes, logarithmic where positive values span more than a factor of 50.

    Args:
        sections: the sections, without empty ones.
        runs: names of the runs, in the order of their colors.
        matrix: cosines of pairs of terms, drawn as a matrix at the end if there are at least three terms.
    """
    from matplotlib.figure import Figure

    matrix = matrix or {}
    columns = max(len(panels) for section in sections for _, panels in section.rows)
    legend = 0.2 + 0.2 * len(list(filter(None, runs)))
    steps = [
        step for section in sections for _, row in section.rows for panel in row if panel for step in _steps(panel)
    ]
    limits = min(steps), max(steps)
    side = 0.34 * len(matrix) + 0.5 if len(matrix) > 2 else 0.0
    heights = [TITLE + BELOW + len(section.rows) * (HEIGHT + _gap(section)) for section in sections]
    size = LEFT + columns * (WIDTH + GAP) + 0.2, legend + sum(heights) + (side + 1.6 if side else 0.1)
    figure = Figure(figsize=size)
    top = size[1] - 0.1
    for number, run in enumerate(filter(None, runs)):
        figure.text(0.15 / size[0], top / size[1], f"— {run}", color=_color(number, runs), va="top", weight="bold")
        top -= 0.2
    top = size[1] - legend
    for section, height in zip(sections, heights, strict=True):
        _draw_section(figure, section, runs, top, limits)
        top -= height
    if side:
        _draw_matrix(figure, matrix, top - 0.4, side)
    return figure


def _draw_section(
    figure: Figure, section: Section, runs: Sequence[str], top: float, limits: tuple[float, float]
) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, (top - 0.05) / height, section.title, va="top", fontsize=11, weight="bold")
    top -= TITLE
    for number, (title, panels) in enumerate(section.rows):
        bottom = top - HEIGHT
        figure.text(0.15 / width, (bottom + HEIGHT / 2) / height, title, va="center", fontsize=9)
        for column, panel in enumerate(panels):
            if panel is None:
                continue
            left = (LEFT if section.columns else 0.75) + column * (WIDTH + GAP)
            axes = figure.add_axes((left / width, bottom / height, WIDTH / width, HEIGHT / height))
            _draw_panel(axes, panel[1], runs)
            margin = 0.02 * (limits[1] - limits[0]) or 0.5
            axes.set_xlim(limits[0] - margin, limits[1] + margin)  # the same for all panels, which share their labels
            if section.columns and number == 0:
                axes.set_title(section.columns[column], fontsize=9)
            elif not section.columns:
                axes.set_title(panel[0], fontsize=8, pad=3)
            below = section.rows[number + 1][1] if number + 1 < len(section.rows) else ()
            if column < len(below) and below[column] is not None and section.columns:
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel("step", fontsize=7, labelpad=1)
        top = bottom - _gap(section)


def _draw_panel(axes: Axes, curves: Mapping[str, Curve], runs: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, run in enumerate(runs):
        if run not in curves:
            continue
        steps, values = curves[run]
        color = _color(number, runs)
        alone = {"marker": "o", "markersize": 3.0} if len(values) < 3 else {}
        if len(values) < MANY:
            axes.plot(steps, values, color=color, linewidth=1.1, **alone)  # type: ignore[arg-type]
        else:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            axes.plot(steps, running_mean(values, len(values) // 50), color=color, linewidth=1.2)
    everything = [value for _, values in curves.values() for value in values]
    if min(everything) > 0 and max(everything) > 50 * min(everything):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.yaxis.get_offset_text().set_fontsize(7)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=7, pad=1, length=2)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_matrix(figure: Figure, matrix: Mapping[str, Mapping[str, float]], top: float, side: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, (top + 0.35) / height, "Cosines between gradients", fontsize=11, weight="bold", va="top")
    axes = figure.add_axes((LEFT / width, (top - side) / height, side / width, side / height))
    names = list(matrix)
    rows = [
        [1.0 if name == partner else matrix[name].get(partner, float("nan")) for partner in names] for name in names
    ]
    axes.imshow(rows, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for i, row in enumerate(rows):
        for j, cosine in enumerate(row):
            color = "white" if abs(cosine) > 0.6 else "black"
            axes.text(j, i, f"{cosine:.1f}".replace("-0.0", "0.0"), ha="center", va="center", fontsize=6, color=color)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over up to `window` values to either side of each value."""
    numbers = torch.tensor([0.0, *values], dtype=torch.float64)
    total = numbers.nan_to_num().cumsum(0)
    present = torch.tensor([0.0, *(float(value == value) for value in values)], dtype=torch.float64).cumsum(0)
    places = torch.arange(len(values))
    first, last = (places - window).clamp_min(0), (places + window + 1).clamp_max(len(values))
    mean: list[float] = ((total[last] - total[first]) / (present[last] - present[first])).tolist()
    return mean


def _steps(panel: tuple[str, Mapping[str, Curve]]) -> list[float]:
    return [step for steps, _ in panel[1].values() for step in (steps[0], steps[-1])]


def _gap(section: Section) -> float:
    return 0.14 if section.columns else 0.5


def _color(number: int, runs: Sequence[str]) -> str:
    if len(runs) == 1:
        return "tab:blue"
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if len(runs) <= 10:
        return to_hex(colormaps["tab10"](number % 10))
    return to_hex(colormaps["turbo"]((number + 0.5) / len(runs)))
