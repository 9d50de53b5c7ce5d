"""Curves, results, configuration and pictures of a run, as its folder has them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError

_OF_EPOCH = re.compile(r"(.+)-epoch-(\d+)")


@dataclass(frozen=True)
class LoggedRun:
    """A run as its folder describes it.

    Attributes:
        folder: its folder.
        curves: steps and finite values of each logged figure, by name.
        results: content of `results.json`; empty before the run has ended.
        configuration: the configuration, by key.
        pictures: the latest picture of each kind, by its title.
    """

    folder: Path
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    results: Mapping[str, Any]
    configuration: Mapping[str, Any]
    pictures: Mapping[str, Path]

    @property
    def terms(self) -> list[str]:
        """Names of the terms of the loss, the task first."""
        names = [name[len("train/") : -len("_weighted")] for name in self.curves if name.endswith("_weighted")]
        return sorted(names, key=lambda name: name != "task")


def read_runs(paths: Sequence[str]) -> dict[str, LoggedRun]:
    """Read runs, and name each by the part of its path that the others do not share.

    Args:
        paths: folders of runs, or files `metrics.csv`.

    Raises:
        UserError: there is no run in a folder, its `metrics.csv` cannot be read, or a run is given twice.
    """
    folders = [Path(path).parent if Path(path).name == "metrics.csv" else Path(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for folder, full in zip(folders, resolved, strict=True):
        if resolved.count(full) > 1:
            raise UserError(f"the run {str(folder)!r} is given twice")
    root = Path(commonpath(resolved)) if len(resolved) > 1 else resolved[0].parent
    names = [str(full.relative_to(root)) if full != root else full.name for full in resolved]
    return {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}


def read_run(folder: Path) -> LoggedRun:
    """Read a run.

    Raises:
        UserError: the folder has no `metrics.csv`, or none with a figure in it.
    """
    file = folder / "metrics.csv"
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has no metrics.csv: give the folder of a run whose logger is the default one")
    try:
        curves = _curves(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}") from None
    if not curves:
        raise UserError(f"{str(file)!r} has no figures yet: a run logs every trainer.log_every_n_steps steps")
    results = _content(folder / "results.json", json.loads)
    configuration = results.get("configuration") or _content(folder / "config.yaml", yaml.safe_load)
    return LoggedRun(folder, curves, results, dict(_leaves(configuration)), _pictures(folder / "pictures"))


def differing_keys(runs: Mapping[str, LoggedRun]) -> dict[str, list[str]]:
    """Return the configuration keys in which runs differ, other than their folders, with each run's value."""
    keys = dict.fromkeys(key for run in runs.values() for key in run.configuration)
    rows = {key: [_shown(run.configuration.get(key, "")) for run in runs.values()] for key in keys}
    folders = ("trainer.default_root_dir", "checkpoint.dirpath", "ckpt_path")
    return {key: row for key, row in rows.items() if len(set(row)) > 1 and key not in folders}


def _curves(file: Path) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    with file.open(newline="") as text:
        for row in csv.DictReader(text):
            step = row.pop("step", None)
            if step is None or not step.isdigit():  # a line that is being written
                continue
            for name, figure in row.items():
                if name and name != "epoch" and (value := _finite(figure)) is not None:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(step))
                    values.append(value)
    return curves


def _finite(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _content(file: Path, parse: Any) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = parse(file.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {str(error).splitlines()[0]}") from None
    return content if isinstance(content, Mapping) else {}


def _pictures(folder: Path) -> dict[str, Path]:
    """Return the latest picture of each kind."""
    latest: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        found = _OF_EPOCH.fullmatch(path.stem)
        kind, epoch = (found[1], int(found[2])) if found else (path.stem, -1)
        if kind not in latest or epoch > latest[kind][0]:
            latest[kind] = epoch, path
    return {kind if epoch < 0 else f"{kind}, epoch {epoch}": path for kind, (epoch, path) in latest.items()}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, key)
        else:
            yield key.replace(".init_args.", "."), value


def _shown(value: Any) -> str:
    return "" if value in (None, "") else str(value)
