"""Distills a teacher into a student on scikit-learn's digits, and prints one table; `--seeds 5` gives its spread."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from comparison import HERE, LAST, Run, compare, table_of
from rich.console import Console

COLUMNS = {"top-1 (%)": "test/top1", "agreement with the teacher (%)": "test/agreement"}


def models(root: Path) -> list[Run]:
    """The teacher, the student alone and the distilled student."""

    def config(name: str) -> list[str]:
        return ["--config", str(HERE / f"{name}.yaml")]

    # the distillation's configuration knows the teacher, so that its test also tells the agreement with it
    distilled = [*config("distill"), f"--model.teacher.weights={root / 'teacher' / LAST}"]
    return [
        Run("teacher", "teacher", config("teacher")),
        Run("student alone", "student", config("student"), test=distilled),
        Run("student distilled", "distill", distilled),
    ]


def main() -> None:
    """Run the demo."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    rows = compare(models, Path("runs/digits"), parser.parse_args().seeds)
    Console().print(table_of(rows, COLUMNS))


if __name__ == "__main__":
    main()
