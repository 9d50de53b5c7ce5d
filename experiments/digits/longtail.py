"""Compares losses on the long-tailed digits, over `--seeds` seeds, and prints one table."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from comparison import HERE, LAST, Run, compare, table_of
from rich.console import Console

COLUMNS = {
    "top-1 (%)": "test/top1",
    "many (%)": "test/many",
    "medium (%)": "test/medium",
    "few (%)": "test/few",
}
WITHOUT_KD = "--model.heads.kd=null"
WITHOUT_TRG = "--model.heads.trg=null"
BALANCED = "--model.task.head=LogitAdjustment"


def models(root: Path) -> list[Run]:
    """The teacher, and the student with less and more terms of the loss."""
    config = ["--config", str(HERE / "longtail.yaml")]
    student = [*config, f"--model.teacher.weights={root / 'teacher' / LAST}"]
    return [
        Run("teacher", "teacher", [*config, "--config", str(HERE / "longtail_teacher.yaml")]),
        Run("CE", "ce", [*student, WITHOUT_KD, WITHOUT_TRG]),
        Run("CE + KD", "kd", [*student, WITHOUT_TRG]),
        Run("CE + TRG", "trg", [*student, WITHOUT_KD]),
        Run("CE + KD + TRG", "kd_trg", student),
        Run("balanced softmax", "balanced", [*student, WITHOUT_KD, WITHOUT_TRG, BALANCED]),
        Run("balanced softmax + TRG", "balanced_trg", [*student, WITHOUT_KD, BALANCED]),
    ]


def main() -> None:
    """Run the comparison."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    rows = compare(models, Path("runs/digits_longtail"), parser.parse_args().seeds)
    Console().print(table_of(rows, COLUMNS))


if __name__ == "__main__":
    main()
