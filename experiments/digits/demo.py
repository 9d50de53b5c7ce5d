"""Distill a teacher into a student on scikit-learn's digits, and print one table; `--seeds 5` gives its spread."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comparison import Model, compare

COLUMNS = {"top-1 (%)": "test/top1", "agreement with the teacher (%)": "test/agreement"}


def models(root: Path) -> list[Model]:
    """Return the teacher, the student alone and the distilled student."""

    def config(name: str) -> str:
        return f"--config=experiments/digits/{name}.yaml"

    distilled = (config("distill"), f"--model.teacher.weights={root}/teacher/checkpoints/last.ckpt")
    return [
        Model("teacher", "teacher", (config("teacher"),), figures={"test/agreement": 1.0}),  # with itself
        # tested under the configuration of the distilled student, which has the teacher to agree with
        Model("student alone", "student", (config("student"),), test=distilled),
        Model("student distilled", "distill", distilled),
    ]


def main(args: list[str]) -> int:
    """Run the demo; return the exit code."""
    return compare(models, COLUMNS, Path("runs/digits"), 1, args, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
