"""The `distill curves` command: one picture, or one page, of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.cli.curves_page import page
from distill.cli.folders import refuse_output, writing
from distill.cli.parser import command_parser
from distill.errors import UserError
from distill.files import write_atomic
from distill.plotting.curves import Curve, Section, draw_sections
from distill.plotting.saving import save_figure
from distill.runs.logged import LoggedRun, read_runs

PICTURES = ("png", "svg", "pdf")
_COLUMNS = {
    "train/{}": "value",
    "train/{}_weighted": "weighted value",
    "train/{}_weight": "weight",
    "train/{}/gradient_share": "share of the gradient",
}
"""Curves of a term, beside each other."""
_ACROSS = 4
"""Panels in a row, where they are not columns of a table."""


def run_curves(args: list[str]) -> None:
    """Draw the curves of runs side by side, from their `metrics.csv`."""
    parser = command_parser("curves")
    parser.add_argument("runs", type=str, nargs="+", help="The folders of the runs.")
    parser.add_argument(
        "--output",
        type=str,
        required=True,
        help="The file to write, which must not exist yet: a picture (.png, .svg or .pdf) of the curves, or a page "
        "(.html) with the runs' results, their differing settings and the heads' pictures too.",
    )
    options = parser.parse_args(args[1:])
    output = Path(options.output)
    kind = output.suffix.lower().removeprefix(".")
    if kind not in (*PICTURES, "html"):
        raise UserError(f"output: {options.output!r} must end with .png, .svg, .pdf or .html")
    refuse_output(options.output)
    runs = read_runs(options.runs)
    figure = draw_sections(sections(runs), list(runs))
    with writing(options.output):
        if kind == "html":
            write_atomic(output, page(runs, figure).encode())
        else:
            save_figure(figure, output, dpi=110)
    print(output)


def sections(runs: Mapping[str, LoggedRun]) -> list[Section]:
    """Arrange the curves of runs: validation and learning rate, a row per term, and all others."""
    names = sorted(dict.fromkeys(name for run in runs.values() for name in run.curves))
    terms = list(dict.fromkeys(term for run in runs.values() for term in run.terms))
    terms.sort(key=lambda term: term != "task")
    shown = {pattern: title for pattern, title in _COLUMNS.items() if any(pattern.format(t) in names for t in terms)}
    of_terms = {pattern.format(term) for pattern in shown for term in terms}
    first = [name for name in names if name.startswith("val/")]
    first += [name for name in ("train/loss", "train/lr") if name in names]
    rest = [name for name in names if name not in of_terms and name not in first and "/gradient_" not in name]
    rows = [(term, [_panel(pattern.format(term), runs) for pattern in shown]) for term in terms]
    found = [
        Section("Validation, total loss and learning rate", (), _in_rows(first, runs)),
        Section("Terms of the loss", list(shown.values()), rows),
        Section("Other curves", (), _in_rows(rest, runs)),
    ]
    return [section for section in found if section.rows]


def _panel(name: str, runs: Mapping[str, LoggedRun]) -> tuple[str, Mapping[str, Curve]] | None:
    curves = {run: logged.curves[name] for run, logged in runs.items() if name in logged.curves}
    return (name, curves) if curves else None


def _in_rows(
    names: Sequence[str], runs: Mapping[str, LoggedRun]
) -> list[tuple[str, list[tuple[str, Mapping[str, Curve]] | None]]]:
    starts = range(0, len(names), _ACROSS)
    return [("", [_panel(name, runs) for name in names[start : start + _ACROSS]]) for start in starts]
