"""An HTML page about runs that needs no other file."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from distill import __version__
from distill.runs.logged import LoggedRun, differing_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 82rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td { max-width: 26rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #555; }
"""
_FACTS = ("epochs", "steps", "wall_seconds", "seed", "effective_batch", "devices", "precision", "monitor")


def page(runs: Mapping[str, LoggedRun], figure: Figure) -> str:
    """Return the page: results, differing settings, curves, and the pictures of each run.

    Args:
        runs: the runs, by name.
        figure: their curves.
    """
    curves = io.BytesIO()
    figure.savefig(curves, format="png", dpi=110)
    names = list(runs)
    title = f"{names[0]}" if len(names) == 1 else f"{len(names)} runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Results</h2>",
        _table(names, _results(runs)),
        *_unfinished(runs),
    ]
    if differences := differing_keys(runs):
        parts += ["<h2>Settings that differ</h2>", _table(names, differences.items())]
    parts += ["<h2>Curves</h2>", _image(curves.getvalue(), "Curves of the runs, by step")]
    for name, run in runs.items():
        if run.pictures:
            parts += [f"<h2>Pictures of {escape(name)}</h2>"]
            for caption, path in run.pictures.items():
                image = _image(path.read_bytes(), caption)
                parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<p>distill {escape(__version__)}</p>\n</body>\n</html>\n"
    )


def _results(runs: Mapping[str, LoggedRun]) -> list[tuple[str, list[str]]]:
    results = [run.results for run in runs.values()]
    rows: dict[str, list[str]] = {}
    for moment in ("last", "best"):
        figures = [result.get(moment) or {} for result in results]
        for key in dict.fromkeys(key for found in figures for key in found):
            rows[f"{moment} {key}"] = [_number(found.get(key)) for found in figures]
    for key in _FACTS:
        rows[key.replace("_", " ")] = [_number(result.get(key)) for result in results]
    return [(key, row) for key, row in rows.items() if any(row)]


def _unfinished(runs: Mapping[str, LoggedRun]) -> list[str]:
    names = [name for name, run in runs.items() if not run.results]
    if not names:
        return []
    return [f"<p>Without results.json, which is written at the end of a run: {escape(', '.join(names))}.</p>"]


def _table(names: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *names))
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>\n'
        for key, row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'


def _image(content: bytes, alternative: str) -> str:
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{b64encode(content).decode()}">'


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
