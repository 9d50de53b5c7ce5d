"""CIFAR-100 recipes: each method composes with each pair, is built and takes a step."""

import csv
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from distill.__main__ import main
from tests.data.test_cifar import write_cifar100
from tests.program import ROOT

CIFAR = ROOT / "experiments" / "cifar100"
PAIRS = sorted(file.stem for file in (CIFAR / "pairs").glob("*.yaml"))
METHODS = sorted(file.stem for file in (CIFAR / "methods").glob("*.yaml"))
SAME_CHANNELS = {
    "resnet110_resnet20",
    "resnet110_resnet32",
    "resnet32x4_resnet8x4",
    "resnet56_resnet20",
    "vgg13_vgg8",
    "wrn_40_2_wrn_16_2",
}
"""Pairs that FSP works with; the CRD benchmark has its figures for these alone."""
ONE_STEP = [
    *("--data.batch_size=4", "--data.num_workers=0", "--data.verify=false", "--model.teacher_dtype=float32"),
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"),
    *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.enable_model_summary=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
]


def configs(pair, method):
    parts = ["recipe", f"pairs/{pair}", f"methods/{method}"]
    return [f"--config={CIFAR / part}.yaml" for part in parts]


def settings(pair, method):
    """Return the recipe with small sizes and memories, and without the teacher's weights."""
    model = yaml.safe_load((CIFAR / "methods" / f"{method}.yaml").read_text())["model"]
    small = {"crd": ["samples=40", "negatives=8"], "rrd": ["size=16"]}
    given = [f"--model.heads.{head}.head.{value}" for head in model["heads"] for value in small.get(head, [])]
    weights = ["--model.teacher.weights=null"] if model.get("teacher", True) else []
    return [*configs(pair, method), *ONE_STEP, *given, *weights]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write a small CIFAR-100 where the recipe expects it."""
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path / "data", train=40, test=8)
    return tmp_path


def understood(pair, method, capsys):
    """Return the resolved configuration."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs(pair, method), "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)


def test_the_pairs_and_methods_are_those_of_the_published_tables():
    assert len(PAIRS) == 13
    first = {"student", "kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ab", "ft", "fsp", "nst"}
    assert first | {"crd", "crd_kd", "rrd", "rrd_kd", "dcd", "dcd_kd", "dkd", "dist", "reviewkd"} <= set(METHODS)


EVERY_DAY = {"student", "kd", "rkd", "rrd_kd", "serkd", "trg", "crd_kd", "mlkd", "wkd"}
"""Methods of the fast suite; the others are alike and left to the slow one."""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in EVERY_DAY else pytest.mark.slow) for name in METHODS]
)
def test_a_method_is_understood(method, capsys):
    found = understood("resnet32x4_resnet8x4", method, capsys)
    written = yaml.safe_load((CIFAR / "methods" / f"{method}.yaml").read_text())["model"]
    assert set(found["model"]["heads"]) == set(written["heads"])
    assert (found["model"]["teacher"] is None) == (method == "student")
    assert found["model"]["optimizer"]["init_args"]["lr"] == 0.05
    stages = found["model"]["scheduler"]["init_args"]["milestones"], found["trainer"]["max_epochs"]
    expected = ([180, 210, 240], 270) if method in ("ab", "ft", "fsp") else ([150, 180, 210], 240)
    assert stages == expected, "240 epochs, after the initialization if there is one"


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_understood(pair, capsys):
    found = understood(pair, "kd", capsys)
    model = found["model"]
    slow = pair.endswith(("mobilenetv2", "shufflenetv1", "shufflenetv2"))
    optimizer = model["optimizer"]["init_args"]
    assert [optimizer[key] for key in ("lr", "momentum", "weight_decay")] == [0.01 if slow else 0.05, 0.9, 5e-4]
    assert model["task"]["weight"] == 0.1
    names = [model[side]["init_args"]["name"] for side in ("teacher", "student")]
    assert "_".join(name.removesuffix("_cifar").removesuffix("_half") for name in names) == pair
    assert model["teacher"]["init_args"]["weights"] == f"weights/cifar100/{names[0]}.pth"


def test_both_networks_of_a_pair_read_the_taps_of_the_benchmark():
    for pair in PAIRS:
        model = yaml.safe_load((CIFAR / "pairs" / f"{pair}.yaml").read_text())["model"]
        assert [model[side]["init_args"]["taps"] for side in ("student", "teacher")] == ["benchmark", "benchmark"], pair


BETAS = {
    **dict.fromkeys(("resnet56_resnet20", "resnet110_resnet32"), 2.0),
    **dict.fromkeys(("vgg13_vgg8", "vgg13_mobilenetv2", "wrn_40_2_wrn_16_2", "wrn_40_2_wrn_40_1"), 6.0),
}
"""DKD's published beta; 8 for all other pairs."""
REVIEW_WEIGHTS = {"resnet56_resnet20": 0.6, "resnet110_resnet32": 1.0, "resnet32x4_shufflenetv2": 8.0}
"""ReviewKD's published weight; 5 for all other pairs."""
STANDARDIZED = {
    "vgg13_vgg8": (9.0, 3.0),
    "vgg13_mobilenetv2": (9.0, 3.0),
    "resnet110_resnet20": (12.0, 4.0),
    "resnet50_mobilenetv2": (1.0, 3.0),
}
"""LSKD's published weight and temperature on KD; 9 and 2 for all other pairs."""
PARTS_BY_PAIR = {
    "dkd": set(BETAS),
    "dkd_two_views": set(BETAS),
    "lskd_dkd": set(BETAS),
    "lskd_kd": set(STANDARDIZED),
    "reviewkd": set(REVIEW_WEIGHTS),
}
FURTHER_PARTS_BY_PAIR = {
    "cat_kd": set(PAIRS) - {"resnet32x4_resnet8x4", "vgg13_mobilenetv2", "resnet110_resnet20", "resnet50_vgg8"},
    **{method: {"wrn_40_2_shufflenetv1"} for method in ("wkd", "wkd_f", "wkd_l")},
    **{method: {"vgg13_mobilenetv2"} for method in ("sdd_dkd", "sdd_nkd")},
}


def composed(pair, method, capsys):
    """Return the terms of the configuration that a study composes."""
    study = runpy.run_path(str(ROOT / "experiments" / "study.py"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", *study["_configs"](CIFAR, pair, method), "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)["model"]["heads"]


def test_the_parts_by_pair_are_those_of_pairs_with_other_public_code_values():
    known = PARTS_BY_PAIR | FURTHER_PARTS_BY_PAIR
    parts = {method: {f.stem for f in (CIFAR / "methods" / method).glob("*.yaml")} for method in known}
    assert parts == known
    assert {file.parent.name for file in (CIFAR / "methods").glob("*/*.yaml")} == set(parts)


@pytest.mark.parametrize("pair", ["resnet32x4_resnet8x4", "resnet56_resnet20", "resnet32x4_shufflenetv2", "vgg13_vgg8"])
def test_a_study_composes_the_weights_of_the_public_code_for_a_pair(pair, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    dkd = composed(pair, "dkd", capsys)["dkd"]
    beta = BETAS.get(pair, 8.0)
    expected = {"alpha": 1.0, "beta": beta, "temperature": 4.0, "standardize": False}
    assert dkd["head"]["init_args"] == expected
    standardized = composed(pair, "lskd_dkd", capsys)["dkd"]
    expected = {"alpha": 9.0, "beta": 9 * beta, "temperature": 2.0, "standardize": True}
    assert standardized["head"]["init_args"] == expected
    assert standardized["weight"] == dkd["weight"]
    assert dkd["weight"]["init_args"] | {"value": 1.0} == dkd["weight"]["init_args"]
    assert dkd["weight"]["init_args"]["epochs"] == 20
    reviewkd = composed(pair, "reviewkd", capsys)["reviewkd"]
    assert reviewkd["weight"]["init_args"]["value"] == REVIEW_WEIGHTS.get(pair, 5.0)
    assert reviewkd["weight"]["init_args"]["epochs"] == 20
    assert reviewkd["head"]["init_args"]["of"] == ["stage*", "embedding"]
    assert reviewkd["head"]["init_args"]["teacher_of"] == ["pre*", "embedding"]


def test_a_study_composes_the_published_values_of_wasserstein_distances_for_a_pair(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    found = {pair: composed(pair, "wkd", capsys) for pair in ("resnet32x4_resnet8x4", "wrn_40_2_shufflenetv1")}
    values = []
    for terms in found.values():
        logits, features = terms["wkd_l"]["head"]["init_args"], terms["wkd_f"]["head"]["init_args"]
        for decay in (logits["gamma"]["init_args"], terms["wkd_f"]["weight"]["init_args"]):
            assert (decay["end"], decay["after"], decay["epochs"]) == (0.0, 150, 90)
        starts = [term["init_args"]["start"] for term in (logits["gamma"], terms["wkd_f"]["weight"])]
        values.append([starts[0], logits["temperature"], starts[1], features["ratio"], features["grid"]])
    assert values == [[200.0, 8.0, 0.08, 8.0, 1], [60.0, 4.0, 0.5, 3.0, 4]]


@pytest.mark.slow
def test_the_further_parts_by_pair_have_their_published_values(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    pair = "wrn_40_2_shufflenetv1"
    term = composed(pair, "wkd_l", capsys)["wkd_l"]["head"]["init_args"]
    assert (term["gamma"]["init_args"]["start"], term["temperature"]) == (200.0, 6.0)
    term = composed(pair, "wkd_f", capsys)["wkd_f"]
    assert (term["weight"]["init_args"]["start"], term["head"]["init_args"]["grid"]) == (0.3, 4)
    for method in ("sdd_dkd", "sdd_nkd"):
        assert composed("vgg13_mobilenetv2", method, capsys)["sdd"]["head"]["init_args"]["beta"] == 6.0
    for name, (resolution, weight) in {"wrn_40_2_shufflenetv1": (4, 80.0), "resnet56_resnet20": (2, 0.7)}.items():
        term = composed(name, "cat_kd", capsys)["cat_kd"]
        assert (term["head"]["init_args"]["resolution"], term["weight"]) == (resolution, weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "pair"), [(method, p) for method, pairs in PARTS_BY_PAIR.items() for p in sorted(pairs)]
)
def test_every_part_by_pair_is_understood(method, pair, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    (term,) = composed(pair, method, capsys).values()
    arguments = term["head"]["init_args"]
    if method == "reviewkd":
        assert term["weight"]["init_args"]["value"] == REVIEW_WEIGHTS[pair]
    elif method == "lskd_kd":
        assert (term["weight"], arguments["temperature"], arguments["standardize"]) == (*STANDARDIZED[pair], True)
    else:
        assert arguments["beta"] == BETAS[pair] * (9 if method == "lskd_dkd" else 1)


def test_a_recipe_names_the_public_code_that_it_follows():
    codes = ("RepDistiller", "mdistiller", "authors'")
    own = {"student", "serkd", "trg"}  # without a teacher, or with choices of this project
    for file in [CIFAR / "recipe.yaml", *(CIFAR / "methods").rglob("*.yaml")]:
        comment = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert any(code in comment for code in codes) or file.stem in own, file


def test_as_in_the_public_code_the_recipe_keeps_the_last_batch(data, capsys):
    found = understood("resnet56_resnet20", "kd", capsys)
    assert found["data"]["init_args"]["drop_last"] is False


def test_published_figures_are_of_pairs_and_methods_that_are_here():
    with open(CIFAR / "published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["pair"] for row in rows} == set(PAIRS)
    assert {row["method"] for row in rows} <= {*METHODS, "teacher"}
    assert len({(row["pair"], row["method"]) for row in rows}) == len(rows)
    assert all(50 < float(row["top1"]) < 80 and row["source"] for row in rows)
    assert {row["pair"] for row in rows if row["method"] == "fsp"} == SAME_CHANNELS
    mean = {
        method: sum(float(row["top1"]) for row in rows if row["method"] == method) / 13
        for method in ("kd", "crd", "crd_kd", "rrd", "rrd_kd", "dcd_kd")
    }
    expected = {"kd": 72.39, "crd": 73.47, "crd_kd": 73.71, "rrd": 72.81, "rrd_kd": 73.76, "dcd_kd": 73.90}
    assert mean == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("pair", sorted(set(PAIRS) - SAME_CHANNELS)[-1:])
def test_a_method_that_cannot_work_on_a_pair_is_refused_in_one_sentence(pair, data, capsys):
    assert main(["fit", *settings(pair, "fsp")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.heads.fsp.head: FSP needs equal channels, but 'stage1' has" in line


def test_a_method_whose_taps_are_not_on_the_pair_is_refused_in_one_sentence(data, capsys):
    taps = [f"--model.{side}.taps=[stem]" for side in ("student", "teacher")]  # in place of the pair's
    assert main(["fit", *settings("resnet56_resnet20", "fitnet"), *taps]) == 2
    assert "model.heads.fitnet.head: FitNet needs 'stage2' of the student, but" in capsys.readouterr().err
    assert main(["fit", *settings("resnet56_resnet20", "at"), *taps]) == 2
    assert "model.heads.at.head: of 'stage*' fits no tap of the student" in capsys.readouterr().err


def test_a_recipe_trains_and_tests_on_files_in_cifars_own_format(data, capsys):
    given = [*settings("resnet32x4_resnet8x4", "rrd_kd"), "--trainer.default_root_dir=run"]
    assert main(["fit", *given]) == 0, capsys.readouterr().err
    assert "train/rrd_weighted" in Path("run/metrics.csv").read_text()
    assert main(["test", *given, "--ckpt_path=run/checkpoints/last.ckpt"]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_takes_a_step_on_the_pair(pair, data, capsys):
    torch.set_num_threads(1)
    for method in METHODS:
        code = main(["fit", *settings(pair, method), "--trainer.default_root_dir=run"])
        message = capsys.readouterr().err
        if method == "fsp" and pair not in SAME_CHANNELS:
            assert code == 2
            assert "FSP needs equal channels" in message
            continue
        assert code == 0, f"{method}: {message}"
        metrics = Path("run/metrics.csv")
        assert metrics.is_file(), method
        assert "train/loss" in metrics.read_text(), method
        shutil.rmtree("run")


@pytest.mark.slow
def test_every_head_takes_a_step_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits = ROOT / "experiments" / "digits"
    for file in sorted((digits / "methods").glob("*.yaml")):
        parts = [digits / "recipe.yaml", digits / "pairs" / "resnet10t_test_resnet.yaml", file]
        weights = [] if file.stem == "student" else ["--model.teacher.weights=null"]
        sizes = [setting for setting in ONE_STEP if not setting.startswith(("--data.verify", "--data.batch_size"))]
        given = [*(f"--config={part}" for part in parts), *sizes, *weights, "--trainer.default_root_dir=run"]
        assert main(["fit", *given]) == 0, f"{file.stem}: {capsys.readouterr().err}"
        assert "train/loss" in Path("run/metrics.csv").read_text(), file.stem
        shutil.rmtree("run")
