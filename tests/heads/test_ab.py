from __future__ import annotations

from pathlib import Path

import pytest

from distill.__main__ import main
from distill.errors import UserError
from distill.features import Features, FeatureSpec
from distill.functional import activation_boundaries
from distill.heads.ab import AB
from tests.golden import Q, assert_relative
from tests.program import TEACHER, TINY
from tests.stages import curves, every_step, moved, weights_by_step

STUDENT, HEADS = "distiller.student.model.", "distiller.objective.heads"


def test_value_and_gradient_are_the_golden_ones() -> None:
    cells = Q([4, 5, 8, 8], 6).requires_grad_()
    student, teacher = Features(maps={"layer": cells}), Features(maps={"layer": Q([4, 5, 8, 8], 7)})
    head = AB("layer")
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    assert_relative("ab", head(student, teacher, {}), cells)


def test_each_layer_counts_twice_the_one_before() -> None:
    names = ["low", "mid", "high"]
    student = Features(maps={name: Q([3, 4, 2, 2], seed) for seed, name in enumerate(names)})
    teacher = Features(maps={name: Q([3, 4, 2, 2], seed + 3) for seed, name in enumerate(names)})
    head = AB(names, margin=0.5)
    head.build(FeatureSpec.of(student), FeatureSpec.of(teacher))
    each = [activation_boundaries(student[name], teacher[name], 0.5).item() for name in names]
    expected = 0.003 * (each[0] / 4 + each[1] / 2 + each[2])
    assert head(student, teacher, {}).item() == pytest.approx(expected, rel=1e-12)


def test_a_connector_is_made_where_channels_or_grids_differ() -> None:
    student = FeatureSpec(maps={"same": (4, 2, 2), "channels": (4, 2, 2), "grid": (4, 2, 2)})
    teacher = FeatureSpec(maps={"same": (4, 2, 2), "channels": (5, 2, 2), "grid": (4, 1, 2)})
    head = AB(["same", "channels", "grid"])
    head.build(student, teacher)
    assert [len(list(connector.parameters())) for connector in head.connectors] == [0, 3, 3]


def test_a_margin_of_0_is_refused() -> None:
    with pytest.raises(UserError, match=r"margin must be above 0, given 0"):
        AB(margin=0.0)


def test_in_the_initialization_the_boundaries_alone_are_learned_and_then_the_labels_alone(tmp_path: Path) -> None:
    arguments = [
        *("--model.student.taps={low: layer2}", "--model.teacher.taps={low: blocks.1}"),
        *("--model.heads.ab.head=AB", "--model.heads.ab.head.of=[low]"),
        *("--model.heads.ab.weight=Until", "--model.heads.ab.weight.epochs=1"),
        *("--model.task.weight=After", "--model.task.weight.epochs=1"),
    ]
    assert main(["fit", *TINY, *TEACHER, *arguments, *every_step(tmp_path)]) == 0
    rows, weights = curves(tmp_path), weights_by_step(tmp_path)
    assert [(row["train/ab_weight"], row["train/task_weight"]) for row in rows] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    assert all(row["train/task"] > 0 for row in rows)
    assert [row.get("train/ab", 0) > 0 for row in rows] == [True, True, False, False], "the teacher has stopped"
    first, second = moved(weights[1], weights[2]), moved(weights[3], weights[4])
    assert {
        f"{STUDENT}layer1.0.conv1.weight",
        f"{HEADS}.ab.connectors.0.0.weight",
    } <= first
    assert not {name for name in first if name.startswith((f"{STUDENT}fc", f"{STUDENT}layer3.0.conv"))}
    assert {f"{STUDENT}layer1.0.conv1.weight", f"{STUDENT}fc.weight"} <= second
    assert not {name for name in second if name.startswith(f"{HEADS}.ab")}
