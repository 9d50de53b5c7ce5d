"""The grid of tuned methods: rows that are kept, and a table whose statistics are those of scipy."""

from __future__ import annotations

import csv
import shutil
import sys

import pytest
import yaml
from scipy import stats

from distill.__main__ import main as distill
from distill.errors import UserError
from tests.program import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

from grid import HERE, Grid, Method, Plan, main
from grid_rows import Row, Rows, digest
from grid_table import holm, paired, write

FIRST = {0: 85.1, 1: 84.2, 2: 86.0, 3: 85.5, 4: 84.9}
SECOND = {0: 84.0, 1: 83.3, 2: 84.6, 3: 84.7, 4: 83.9, 7: 10.0}


def test_a_difference_is_paired_by_seed_with_the_interval_and_test_of_scipy():
    difference = paired(FIRST, SECOND)
    pairs = [(FIRST[seed], SECOND[seed]) for seed in FIRST]
    expected = stats.ttest_rel(*zip(*pairs, strict=True))
    low, high = expected.confidence_interval(0.95)
    assert difference.seeds == 5
    assert difference.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert difference.mean - difference.half == pytest.approx(low, rel=1e-9)
    assert difference.mean + difference.half == pytest.approx(high, rel=1e-9)
    unpaired = stats.ttest_ind([a for a, _ in pairs], [b for _, b in pairs])
    assert difference.p < unpaired.pvalue, "here, pairing matters"


def test_one_seed_has_no_interval_and_seeds_that_differ_nothing():
    difference = paired({3: 85.0}, SECOND)
    assert (str(difference), difference.half, difference.p) == ("+0.30", None, None)
    assert paired({8: 1.0}, SECOND) is None


def test_equal_differences_have_no_width():
    assert str(paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})) == "+1.00 ± 0.00"


@pytest.mark.parametrize("values", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.9], [0.5], []])
def test_holm_rejects_what_the_stepwise_rule_rejects(values):
    corrected = holm(values)
    for level in (0.001, 0.01, 0.02, 0.05, 0.1, 0.5):
        rejected, order = set(), sorted(range(len(values)), key=lambda number: values[number])
        for rank, number in enumerate(order):  # Holm's rule, literally
            if values[number] > level / (len(values) - rank):
                break
            rejected.add(number)
        assert {number for number, p in enumerate(corrected) if p <= level} == rejected


def test_holm_is_bonferroni_for_the_smallest():
    values = [0.012, 0.3, 0.04]
    assert min(holm(values)) == pytest.approx(3 * 0.012)


def test_rows_survive_writing_and_reading(tmp_path):
    rows = Rows(tmp_path / "runs.csv")
    made = [
        Row("weight", "rkd", 100, 0.1, 3.0, "abc", validation=0.71),
        Row("weight", "rkd", 100, 0.1, 9.0, "abc", validation=0.74),
        Row("final", "kd_rkd", 0, 0.1, 9.0, "def", "kd=3", validation=0.5, test=0.51, calibration=0.02, seconds=12.5),
    ]
    for row in made:
        rows.add(row)
    again = Rows(tmp_path / "runs.csv")
    assert [vars(row) for row in again] == [vars(row) for row in made]
    assert again.best("weight", "rkd").weight == 9.0
    assert Row("weight", "rkd", 100, 0.1, 9.0, "abc") in again
    assert Row("weight", "rkd", 100, 0.1, 27.0, "abc") not in again
    (tmp_path / "runs.csv").write_text((tmp_path / "runs.csv").read_text() + "final,student,x,,,,,,,,,\n")
    with pytest.raises(UserError, match=r"runs.csv: line 5 is no row of a grid"):
        Rows(tmp_path / "runs.csv")


def test_a_tuning_seed_is_not_used_again_and_comparisons_name_methods(tmp_path):
    plan = {"tuning_seed": 1, "seeds": [0, 1], "learning_rates": [0.1], "methods": {"student": {}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError, match="seed 1 is used for tuning"):
        Plan.read(tmp_path)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**plan, "seeds": [0], "comparisons": [["kd", "student"]]}))
    with pytest.raises(UserError, match="there is no method 'kd' among student"):
        Plan.read(tmp_path)
    with pytest.raises(UserError, match="is no grid: it has no grid.yaml; there are .*fashion_mnist/cnn"):
        Plan.read(tmp_path / "nowhere")


def test_two_processes_add_their_rows_to_one_file(tmp_path):
    first, second = (Rows(tmp_path / "runs.csv") for _ in range(2))
    first.add(Row("final", "student", 0, 0.1, None, "abc", test=0.5))
    second.add(Row("final", "student", 1, 0.1, None, "abc", test=0.6))
    assert [row.seed for row in Rows(tmp_path / "runs.csv")] == [0, 1]


def test_figures_of_an_earlier_weight_are_not_mixed_with_those_of_a_new_one(tmp_path):
    rows = Rows(tmp_path / "runs.csv")
    for seed in (0, 1, 2):
        rows.add(Row("final", "kd", seed, 0.1, 1.0, "abc", test=0.5))
    rows.add(Row("final", "kd", 1, 0.1, 3.0, "abc", test=0.9))
    assert {seed: row.test for seed, row in rows.final("kd").items()} == {1: 0.9}


def test_arguments_that_change_what_a_run_does_are_part_of_its_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {task: null}\n")
    files = [tmp_path / "recipe.yaml"]
    same = ["--trainer.accelerator=gpu", "--data.num_workers", "4", "--data.root=/where/it/is"]
    assert digest(files, same) == digest(files)
    other = {digest(files, [*same, *more]) for more in (["--trainer.max_epochs=1"], ["--trainer.max_epochs", "2"])}
    assert len(other | {digest(files)}) == 3


GRIDS = sorted(str(file.parent.relative_to(HERE)) for file in HERE.rglob("grid.yaml"))


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_has_the_files_of_its_methods_and_they_are_understood(name, tmp_path, capsys):
    folder = HERE / name
    plan = Plan.read(folder)
    grid = Grid(name, folder, tmp_path, plan, Rows(tmp_path / "runs.csv"))
    terms = dict.fromkeys(term for method in plan.methods.values() for term in method.terms)
    for method in plan.methods.values():
        heads = grid.heads(method)
        assert bool(method.weights) == bool(heads), "what has a weight is tuned"
        assert not method.weights or method.terms[-1] in heads, "the last term's weight is tuned"
        assert {term for term in method.terms[:-1] if term in heads} <= plan.methods.keys(), "others are tuned alone"
    with pytest.raises(SystemExit) as stop:
        distill(["fit", *grid.arguments(Method("all", tuple(terms))), "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert set(yaml.safe_load(printed.out)["model"]["heads"]) == set(grid.heads(Method("all", tuple(terms))))


def test_a_part_without_heads_changes_the_recipe_and_has_no_weight(grid, tmp_path):
    task = {"model": {"task": {"head": {"class_path": "LogitAdjustment"}, "weight": 1.0}}}
    (grid / "methods" / "balanced.yaml").write_text(yaml.safe_dump(task))
    rows = Rows(tmp_path / "runs.csv")
    rows.add(Row("learning rate", "student", 9, 0.1, None, "abc", validation=0.6))
    rows.add(Row("weight", "kd", 9, 0.1, 3.0, "abc", validation=0.7))
    rows.add(Row("weight", "kd", 9, 0.3, 9.0, "abc", validation=0.8))  # of another learning rate
    made = Grid("grid", grid, tmp_path, Plan.read(grid), rows)
    alone = made.run(Method("balanced", ("balanced",)), "final", 0, 0.1, None).fit
    assert f"--config={grid / 'methods' / 'balanced.yaml'}" in alone
    assert "--model.teacher=null" in alone, "no head reads a teacher"
    both = made.run(Method("balanced_kd_rkd", ("balanced", "kd", "rkd")), "final", 0, 0.1, 0.5).fit
    assert [word for word in both if ".weight=" in word] == [
        "--model.heads.kd.weight=3",
        "--model.heads.rkd.weight=0.5",
    ]
    assert "--model.teacher=StoredTeacher" in both
    (grid / "methods" / "rkd.yaml").write_text((grid / "methods" / "kd.yaml").read_text())
    with pytest.raises(UserError, match=r"rkd\.yaml: a term's file has one head of its name, rkd, and not kd"):
        made.run(Method("rkd", ("rkd",)), "final", 0, 0.1, 1.0)


def test_a_long_tail_adds_columns_and_rows_of_an_older_file_are_kept(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text(
        "stage,method,seed,learning_rate,weight,recipe,validation,test,agreement,calibration,seconds\n"
        "final,student,0,0.1,,abc,0.5,0.51,,0.02,12.5\n"
    )
    rows = Rows(tmp_path / "runs.csv")
    write(rows, [], tmp_path)
    assert "many" not in (tmp_path / "table.md").read_text()
    result = {"validation": {"val/top1": 0.6}, "seconds": 3.0}
    tested = {"test/top1": 0.6, "test/many": 0.9, "test/medium": 0.5, "test/few": 0.25}
    rows.add(Row("final", "student", 1, 0.1, None, "abc").of({**result, "last": tested}))
    again = list(Rows(tmp_path / "runs.csv"))
    assert [vars(row) for row in again] == [vars(row) for row in rows]
    assert [row.few_shot for row in again] == [None, 0.25]
    assert [row.seconds for row in again] == [12.5, 3.0]
    write(rows, [], tmp_path)
    header, _, line = (tmp_path / "table.md").read_text().splitlines()[:3]
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert [cells[name] for name in ("many (%)", "medium (%)", "few (%)")] == ["90.00", "50.00", "25.00"]


RECIPE = """
data: {class_path: Digits, init_args: {batch_size: 32, draws: 1, seed: 0}}
model:
  student: {class_path: Timm, init_args: {name: test_resnet}}
  teacher: {class_path: Timm, init_args: {name: test_resnet}}
  optimizer: {class_path: SGD, init_args: {lr: 0.1}}
trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 3}
"""


@pytest.fixture
def grid(tmp_path):
    folder = tmp_path / "grid"
    (folder / "methods").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, head in (("kd", "KD"), ("rkd", "RKD")):
        term = {name: {"head": {"class_path": head}, "weight": 1.0}}
        (folder / "methods" / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"heads": term}}))
    plan = {
        "tuning_seed": 9,
        "seeds": [0, 1],
        "learning_rates": [0.01],
        "methods": {
            "student": {},
            "kd": {"weights": [1, 3]},
            "kd_rkd": {"terms": ["kd", "rkd"], "weights": [0.5]},
        },
        "comparisons": [["kd", "student"], ["kd_rkd", "kd"]],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(plan))
    return folder


@pytest.mark.slow
def test_a_grid_tunes_tests_once_and_goes_on_where_it_was(grid, tmp_path, capfd):
    command = [str(grid), f"--root={tmp_path / 'runs'}", "--jobs=1"]
    assert main(command) == 0
    with (grid / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["learning rate"] + ["weight"] * 3 + ["final"] * 6
    assert all(bool(row["test"]) == (row["stage"] == "final") for row in rows), "only final runs are tested"
    best = {row["method"]: row for row in rows if row["stage"] == "weight"}
    assert len({row["learning_rate"] for row in rows if row["stage"] != "learning rate"}) == 1
    assert {row["weight"] for row in rows if row["stage"] == "final" and row["method"] == "kd_rkd"} == {
        best["kd_rkd"]["weight"]
    }
    table = (grid / "table.md").read_text()
    assert "kd_rkd against kd" in table
    assert "10 runs" in table
    assert (grid / "intervals.png").stat().st_size > 1000
    lines = (grid / "runs.csv").read_text().splitlines()
    (grid / "runs.csv").write_text("\n".join(lines[:-2]) + "\n")  # the last run is to be done again
    shutil.rmtree(tmp_path / "runs/final")
    assert main(command) == 0
    again = (grid / "runs.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[0] for line in again] == [line.rsplit(",", 1)[0] for line in lines], "but the seconds"
    (grid / "methods/kd.yaml").write_text((grid / "methods/kd.yaml").read_text().replace("1.0", "2.0"))
    capfd.readouterr()
    assert main(command) == 2
    assert "the configurations of kd, kd_rkd have changed since" in capfd.readouterr().err


@pytest.mark.parametrize(
    "folder", sorted(file.parent for file in HERE.glob("**/table.md")), ids=lambda folder: folder.name
)
def test_the_table_of_a_readme_is_that_of_the_committed_rows(folder, tmp_path, capsys):
    write(Rows(folder / "runs.csv"), Plan.read(folder).comparisons, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table == (folder / "table.md").read_text()
    assert table in (folder / "README.md").read_text()
