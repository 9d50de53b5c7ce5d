"""Shares of gradients during training, and terms that are kept at a share."""

import csv

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from distill.__main__ import main
from distill.callbacks import GradientShares
from distill.callbacks.gradient_shares import FACTORS
from distill.cli.program import run
from distill.errors import UserError
from tests.program import KD, RKD, TEACHER, TINY
from tests.runs.test_resume import assert_equal_bits, weights

RRD = ["--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=32"]
SHARES = ["--trainer.callbacks+=GradientShares", "--trainer.callbacks.every=1"]
STEPS = ["--trainer.limit_train_batches=6", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(folder):
    """Return the figures of each step, from all its rows."""
    found = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["step"]), {}).update(
                {name: float(value) for name, value in row.items() if value and name != "step"}
            )
    return found


def test_measuring_changes_no_bit_of_a_run(tmp_path):
    fit = [
        *("fit", *TINY, *TEACHER, *KD, *RRD, *STEPS, "--trainer.accumulate_grad_batches=2"),
        "--model.student.options={drop_path_rate: 0.2, drop_rate: 0.3}",
    ]
    run([*fit, "--trainer.default_root_dir=plain"])
    run([*fit, *SHARES, "--trainer.default_root_dir=measured"])
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("plain", "measured")
    ]
    assert_equal_bits(states[1]["state_dict"], states[0]["state_dict"])
    first, second = (state["callbacks"]["RandomState"] for state in states)
    assert str(first) == str(second)
    measured = rows(tmp_path / "measured")
    assert "train/rrd/gradient_share" not in measured[0], "its memory is not filled yet"
    assert {"train/kd/gradient_share", "train/kd/gradient_norm", "train/kd/gradient_cosine"} <= measured[0].keys()
    assert measured[2]["train/rrd/gradient_share"] > 0
    assert measured[2]["train/rrd/gradient_cosine/kd"] == measured[2]["train/kd/gradient_cosine/rrd"]
    assert measured[2]["train/task/gradient_share"] == 1.0
    assert (tmp_path / "measured/pictures/gradient_shares.png").read_bytes().startswith(b"\x89PNG")


BALANCED = [*TINY, *TEACHER, *KD, *RKD, *STEPS, *SHARES, "--trainer.callbacks.balance={rkd: 0.3}"]


@pytest.mark.slow
def test_a_balanced_term_moves_to_its_share_and_resumes_bit_for_bit(tmp_path):
    fit = ["fit", *BALANCED, "--checkpoint.every_n_train_steps=1"]
    fit += ["--checkpoint.monitor=null", "--checkpoint.save_top_k=-1", "--checkpoint.filename={step}"]
    fit += ["--model.heads.rkd.weight=Linear", "--model.heads.rkd.weight.start=1", "--model.heads.rkd.weight.end=2"]
    cli = run([*fit, "--trainer.default_root_dir=whole"])
    logged = rows(tmp_path / "whole")
    for step in range(1, 6):
        before, now = logged[step - 1], logged[step]
        effective = (1 + step / 6) * before["train/rkd/factor"]
        assert now["train/rkd_weight"] == pytest.approx(effective, rel=1e-6)
    last = logged[5]
    assert abs(last["train/rkd/gradient_share"] - 0.3) < 0.15, "the mean of six steps"
    assert abs(logged[0]["train/rkd/gradient_share"] - 0.3) > 0.15, "before"
    assert cli.model.distiller.objective.factor("kd") == 1.0
    run([*fit, "--trainer.default_root_dir=rest", "--ckpt_path=whole/checkpoints/step=3.ckpt"])
    resumed, uninterrupted = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("rest", "whole"))
    assert_equal_bits(resumed, uninterrupted)
    assert rows(tmp_path / "rest") == {step: row for step, row in logged.items() if step > 2}


@pytest.mark.slow
def test_a_factor_stays_in_its_range():
    cli = run(["fit", *TINY, *TEACHER, *RKD, *SHARES, "--trainer.callbacks.balance={rkd: 1e9}"])
    assert cli.model.distiller.objective.factor("rkd") == FACTORS[1]


class Recorder(GradientShares):
    """Keeps the measurements."""

    def __init__(self, at="parameters"):
        super().__init__(every=1, at=at)
        self.found = []

    def on_measured(self, trainer, objective, measurement):
        self.found.append(measurement)
        super().on_measured(trainer, objective, measurement)


def measured(precision, at="parameters", scale=2.0**10):
    """Return the first step's shares in a precision, on a CPU."""
    plugin = {
        "32": None,
        "bf16": MixedPrecision("bf16-mixed", "cpu"),
        "16": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale)),
    }[precision]
    cli = run(["check", *TINY, *TEACHER, *KD, *RKD])
    recorder = Recorder(at)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        plugins=[plugin] if plugin else None,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(cli.model, cli.datamodule)
    return recorder.found


@pytest.mark.slow
@pytest.mark.parametrize("at", ["parameters", "embedding", "tokens"])
def test_mixed_precision_gives_the_shares_of_float32(at):
    expected = measured("32", at)[0].shares("task")
    for precision, tolerance in (("bf16", 0.1), ("16", 0.02)):
        shares = measured(precision, at)[0].shares("task")
        assert shares.keys() == expected.keys() == {"task", "kd", "rkd"}
        for name, share in shares.items():
            assert share.norm == pytest.approx(expected[name].norm, rel=tolerance)


@pytest.mark.slow
def test_a_term_that_overflows_in_float16_is_left_out():
    with pytest.warns(UserWarning, match=r"the gradient of 'task'.* overflowed in float16"):
        found = measured("16", "embedding", scale=2.0**40)
    assert "task" not in found[0].products


class Poison(Callback):
    """Makes the gradient of RKD infinite, but not its value."""

    def on_train_start(self, trainer, pl_module):
        head = pl_module.terms["rkd"].head
        head.register_forward_hook(lambda module, inputs, value: value + (0.0 * value).sqrt())


MISTAKES = {
    "one term": ([], "trainer.callbacks: GradientShares: gradients of several terms are compared, but 'task' is the"),
    "no steps": (["--trainer.callbacks.every=0", *RKD], "every must be at least 1, given 0"),
    "a share of 0": (
        ["--trainer.callbacks.balance={rkd: 0}", *RKD],
        "balance: the share of 'rkd' must be above 0, given",
    ),
    "an unknown term": (
        ["--trainer.callbacks.balance={rdk: 0.3}", *RKD],
        "GradientShares: balance: there is no term 'rdk': did you mean 'rkd'?",
    ),
    "the reference": (["--trainer.callbacks.balance={task: 0.3}", *RKD], "shares are relative to the task's gradient"),
    "a term that is not there": (
        [
            "--trainer.callbacks.balance={hint: 0.3}",
            "--trainer.callbacks.at=embedding",
            "--model.heads.hint.head=FitNet",
        ],
        "balance: the gradient of 'hint' does not reach the embedding of the student",
    ),
    "a frozen backbone": (
        [*RKD, "--trainer.callbacks+=FrozenBackbone"],
        "has no trainable parameter below its classif",
    ),
    "a gradient that is not finite": (
        [*RKD, "--trainer.callbacks+=tests.callbacks.test_gradient_shares.Poison"],
        "the gradient of the term 'rkd' is not finite at step 0; the last checkpoint is intact",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_sentence(mistake, tmp_path, capsys):
    args, message = MISTAKES[mistake]
    assert main(["fit", *TINY, *TEACHER, *SHARES, *args, "--trainer.default_root_dir=run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line
    if mistake not in ("a term that is not there", "a gradient that is not finite"):
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_callbacks_measure_at_two_places(tmp_path):
    both = ["--trainer.callbacks+=GradientShares", "--trainer.callbacks.at=embedding"]
    cli = run(["fit", *TINY, *TEACHER, *KD, *SHARES, *both, "--trainer.default_root_dir=run"])
    keys = {item.state_key for item in cli.trainer.callbacks if isinstance(item, GradientShares)}
    assert len(keys) == 2


def test_an_unknown_place_is_refused():
    with pytest.raises(UserError, match="at cannot be 'logits': known are 'embedding', 'parameters' and 'tokens'"):
        GradientShares(at="logits")
