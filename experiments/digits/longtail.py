"""Compare losses on the long-tailed digits over `--seeds` seeds, and print one table."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comparison import Model, compare

COLUMNS = {
    "top-1 (%)": "test/top1",
    "many (%)": "test/many",
    "medium (%)": "test/medium",
    "few (%)": "test/few",
}
WITHOUT_KD = "--model.heads.kd=null"
WITHOUT_TRG = "--model.heads.trg=null"
BALANCED = "--model.task.head=LogitAdjustment"


def models(root: Path) -> list[Model]:
    """Return the teacher, and the student with different terms of the loss."""
    config = "--config=experiments/digits/longtail.yaml"
    student = (config, f"--model.teacher.weights={root}/teacher/checkpoints/last.ckpt")
    return [
        Model("teacher", "teacher", (config, "--config=experiments/digits/longtail_teacher.yaml")),
        Model("CE", "ce", (*student, WITHOUT_KD, WITHOUT_TRG)),
        Model("CE + KD", "kd", (*student, WITHOUT_TRG)),
        Model("CE + TRG", "trg", (*student, WITHOUT_KD)),
        Model("CE + KD + TRG", "kd_trg", student),
        Model("balanced softmax", "balanced", (*student, WITHOUT_KD, WITHOUT_TRG, BALANCED)),
        Model("balanced softmax + TRG", "balanced_trg", (*student, WITHOUT_KD, BALANCED)),
    ]


def main(args: list[str]) -> int:
    """Run the comparison; return the exit code."""
    return compare(models, COLUMNS, Path("runs/digits_longtail"), 5, args, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
