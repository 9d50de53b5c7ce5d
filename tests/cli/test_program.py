"""The command line on real configurations: composing, overriding, resuming, and known pitfalls of LightningCLI."""

import re

import pytest
import torch
import yaml

from distill.__main__ import main
from distill.cli.program import run
from distill.heads import kd
from distill.heads.dkd import DKD
from distill.schedules import Warmup
from tests.program import KD, RKD, TEACHER, TINY

BASE = """
seed_everything: 0
data: {class_path: Digits, init_args: {batch_size: 16}}
model:
  student: {class_path: Timm, init_args: {name: test_resnet}}
  teacher: {class_path: Timm, init_args: {name: test_efficientnet}}
  optimizer: {class_path: AdamW, init_args: {lr: 0.001, weight_decay: 0.25}}
trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, limit_test_batches: 1,
          enable_progress_bar: false, enable_model_summary: false}
"""
HEADS = """
model:
  heads:
    kd: {head: {class_path: KD, init_args: {temperature: 3.0}}, weight: 0.9}
    rkd: {head: {class_path: RKD}, weight: {class_path: Warmup, init_args: {value: 2.0, steps: 10}}}
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "heads.yaml").write_text(HEADS)


def checked(*args):
    """Return the module that `distill check` builds from a configuration."""
    return run(["check", "--config=base.yaml", "--config=heads.yaml", *args]).model


def test_configurations_compose_from_parts():
    terms = checked().terms
    assert list(terms) == ["task", "kd", "rkd"]
    assert terms["kd"].weight == 0.9
    assert terms["kd"].head.temperature == 3.0
    assert isinstance(terms["rkd"].weight, Warmup)


def test_single_numbers_inside_the_heads_mapping_can_be_overridden():
    terms = checked(
        "--model.heads.kd.weight=0.5", "--model.heads.kd.head.temperature=2", "--model.heads.rkd.weight=3"
    ).terms
    assert terms["kd"].weight == 0.5
    assert terms["kd"].head.temperature == 2.0
    assert terms["rkd"].weight == 3.0


def test_heads_are_added_swapped_and_removed_from_the_command_line():
    terms = checked(
        "--model.heads.dkd.head=DKD",
        "--model.heads.dkd.weight=3",
        "--model.heads.rkd=null",
        "--model.heads.kd.head=DKD",
    ).terms
    assert list(terms) == ["task", "kd", "dkd"]
    assert isinstance(terms["kd"].head, DKD)
    assert terms["kd"].weight == 0.9
    assert terms["dkd"].weight == 3.0


def test_a_head_may_be_given_by_its_name_alone(tmp_path):
    (tmp_path / "names.yaml").write_text("model: {heads: {kd: KD, rkd: distill.heads.rkd.RKD}}")
    terms = run(["check", "--config=base.yaml", "--config=names.yaml", "--model.heads.dkd=DKD"]).model.terms
    assert [type(term.head).__name__ for term in terms.values()] == ["CrossEntropy", "KD", "RKD", "DKD"]
    assert terms["kd"].weight == 1.0


def test_a_head_swapped_by_its_name_alone_keeps_its_weight():
    terms = checked("--model.heads.kd=DKD").terms
    assert isinstance(terms["kd"].head, DKD)
    assert terms["kd"].weight == 0.9


def test_of_two_classes_with_one_name_the_derived_one_is_taken():
    module = checked("--model.scheduler=ReduceLROnPlateau", "--model.scheduler.monitor=val/top1")
    assert module.trainer.lr_scheduler_configs[0].monitor == "val/top1"


def test_swapping_a_heads_class_resets_its_arguments():
    assert checked("--model.heads.kd.head=DKD").terms["kd"].head.temperature == 4.0


def test_a_head_with_weight_0_is_not_built():
    model = checked("--model.heads.rkd.weight=0")
    assert list(model.terms) == ["task", "kd"]
    assert "rkd" not in model.distiller.objective.heads


def test_the_task_can_be_weighted_and_smoothed():
    task = checked("--model.task.weight=0.1", "--model.task.head.label_smoothing=0.2").terms["task"]
    assert task.weight == 0.1
    assert task.head.label_smoothing == 0.2


def test_swapping_an_optimizers_class_resets_its_arguments():
    model = checked("--model.optimizer=SGD", "--model.optimizer.lr=0.1")
    optimizer = model.optimizer(model.student.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["weight_decay"] == 0


def test_swapping_an_optimizers_class_in_a_file_resets_its_arguments(tmp_path):
    (tmp_path / "sgd.yaml").write_text("model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}}")
    model = checked("--config=sgd.yaml")
    assert model.optimizer(model.student.parameters()).defaults["weight_decay"] == 0


def test_a_timm_optimizer_is_given_by_its_class_path():
    model = checked("--model.optimizer=timm.optim.Lamb", "--model.optimizer.lr=0.1")
    assert type(model.optimizer(model.student.parameters())).__name__ == "Lamb"


def test_print_config_shows_the_resolved_tree(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=base.yaml", "--config=heads.yaml", "--model.heads.kd.weight=0.25", "--print_config"])
    assert stop.value.code == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["model"]["heads"]["kd"]["weight"] == 0.25
    assert tree["model"]["heads"]["kd"]["head"]["init_args"] == {"temperature": 3.0, "standardize": False}
    assert tree["model"]["task"]["head"]["class_path"].endswith("CrossEntropy")


def test_a_saved_configuration_reproduces_its_run(tmp_path):
    assert main(["fit", "--config=base.yaml", "--config=heads.yaml", "--trainer.default_root_dir=a"]) == 0
    assert main(["fit", "--config=a/config.yaml", "--trainer.default_root_dir=b"]) == 0
    first, second = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in "ab")
    assert all(torch.equal(first["state_dict"][name], tensor) for name, tensor in second["state_dict"].items())


def test_a_file_may_have_the_keys_of_a_training_that_the_command_lacks(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("resume: false\nweights_only: null\nckpt_path: null\n")
    with pytest.raises(SystemExit) as end:
        main(["store", f"--config={tmp_path / 'run.yaml'}", *TINY, "--output=stored", "--print_config"])
    assert end.value.code == 0
    assert not {"resume", "weights_only", "ckpt_path"} & yaml.safe_load(capsys.readouterr().out).keys()


@pytest.mark.slow
def test_every_command_accepts_the_saved_configuration_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(["fit", *TINY, *TEACHER, "--model.heads.rrd.head=RRD", "--trainer.default_root_dir=run"])
    saved = tmp_path / "run/config.yaml"
    assert "resume" not in yaml.safe_load(saved.read_text())
    saved.write_text(saved.read_text() + "resume: false\n")  # as earlier versions saved it
    checkpoint = "--ckpt_path=run/checkpoints/last.ckpt"
    commands = [["test", checkpoint], ["plot", checkpoint, "--images=1"], ["check", "--trainer.default_root_dir=new"]]
    commands += [
        ["weigh", "--steps=1", "--warmup=0"],
        ["store", "--output=stored", "--data.draws=1", "--splits", "val"],
    ]
    for name, *options in commands:
        assert main([name, "--config=run/config.yaml", *options]) == 0, capsys.readouterr().err
    assert main(["test", "--config=run/config.yaml", "--resume"]) == 2
    assert "there is no option --resume" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text("resumed: true\n")
    assert main(["test", "--config=run/config.yaml", "--config=wrong.yaml"]) == 2
    assert "there is no key 'resumed'" in capsys.readouterr().err


def test_a_run_saves_configuration_metrics_and_checkpoints_in_one_folder(tmp_path):
    args = [
        "--config=base.yaml",
        "--config=heads.yaml",
        "--trainer.default_root_dir=a",
        "--trainer.log_every_n_steps=1",
    ]
    assert main(["fit", *args]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "results.json",
    ]
    header, first, *_ = (tmp_path / "a/metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), first.split(","), strict=True))
    for name in ("task", "kd", "rkd"):
        raw, weight, weighted = (float(logged[f"train/{name}{part}"]) for part in ("", "_weight", "_weighted"))
        assert weighted == pytest.approx(raw * weight, rel=1e-5)
    assert {"val/top1", "val/top5", "val/calibration_error", "val/agreement", "val/kl_to_teacher"} <= set(logged)


def test_the_command_line_takes_precedence_over_a_checkpoint(tmp_path):
    configs = ["--config=base.yaml", "--config=heads.yaml"]
    assert main(["fit", *configs, "--trainer.default_root_dir=a"]) == 0
    last = "--ckpt_path=a/checkpoints/last.ckpt"
    resumed = run(
        [
            "fit",
            *configs,
            last,
            "--model.heads.kd.weight=0.123",
            "--trainer.max_epochs=2",
            "--trainer.default_root_dir=a",
        ]
    )
    assert resumed.model.terms["kd"].weight == 0.123
    assert resumed.trainer.global_step == 4
    assert (tmp_path / "a/resumed-1/config.yaml").exists(), "a resumed run does not overwrite the first"
    tested = run(["test", *configs, last, "--model.heads.kd.weight=0.9"])
    assert tested.model.terms["kd"].weight == 0.9


def test_a_checkpoint_can_be_tested_with_other_heads(tmp_path):
    assert main(["fit", *TINY, "--trainer.default_root_dir=a"]) == 0
    tested = run(["test", *TINY, *TEACHER, *KD, *RKD, "--ckpt_path=a/checkpoints/last.ckpt"])
    assert 0 <= tested.trainer.callback_metrics["test/agreement"] <= 1


def test_validate_and_predict_run():
    assert main(["validate", *TINY, *TEACHER, *KD]) == 0
    assert main(["predict", *TINY, "--trainer.limit_predict_batches=1"]) == 0


def test_check_prints_the_set_up_and_writes_no_files(capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert main(["check", "--config=base.yaml", "--config=heads.yaml", "--model.student.taps=[layer3]"]) == 0
    output = capsys.readouterr().out
    names = "test_resnet", "test_efficientnet", "tap layer3", "embedding", "KD", "Warmup"
    for word in (*names, "1,078", "16 = 16 images x 1 devices"):
        assert word in output
    assert sorted(tmp_path.iterdir()) == before


def test_a_distill_schedule_changes_the_learning_rate_every_step():
    cli = run(["fit", *TINY, "--trainer.default_root_dir=a", "--model.scheduler=Warmup", "--model.scheduler.steps=4"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 2 / 4)


def test_a_torch_scheduler_changes_the_learning_rate_every_epoch():
    cli = run(
        ["fit", *TINY, "--trainer.default_root_dir=a", "--model.scheduler=StepLR", "--model.scheduler.step_size=1"]
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_timm_scheduler_changes_the_learning_rate_every_epoch():
    scheduler = [
        "--model.scheduler=TimmScheduler",
        "--model.scheduler.num_epochs=4",
        "--model.scheduler.warmup_epochs=2",
    ]
    cli = run(["fit", *TINY, "--trainer.default_root_dir=a", *scheduler])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005, rel=1e-3)


def test_all_label_losses_train_on_mixed_labels():
    args = ["--data.mixing.mixup=0.8", "--data.mixing.cutmix=1.0", "--model.task.head.label_smoothing=0.1"]
    assert main(["fit", *TINY, *TEACHER, *KD, "--model.heads.dkd.head=DKD", *args, "--trainer.default_root_dir=a"]) == 0


def test_short_names_resolve_to_the_shipped_classes():
    assert isinstance(checked().terms["kd"].head, kd.KD)


def test_help_describes_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    output = capsys.readouterr().out
    assert "--model.heads" in output
    assert "terms by name, each a head with its weight" in output
    assert "distill.heads" not in output.split("usage")[0]


def test_check_reports_the_effective_batch_the_learning_rate_and_rank_dependent_heads(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "240")
    checked(
        "--model.heads.rkd.head.scope=batch",
        "--model.lr_scaling=linear",
        "--model.lr_base_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.accumulate_grad_batches=2",
    )
    printed = capsys.readouterr().out
    rows = {name: next(line for line in printed.splitlines() if f" {name} " in line) for name in ("kd", "rkd")}
    assert "batch (its value depends on the number of ranks)" in rows["rkd"]
    assert "depends" not in rows["kd"]
    images = int(re.search(r"effective batch\W+\d+ = (\d+) images x 2 devices x 2 accumulated", printed)[1])
    assert re.search(rf"learning rate .* x {images * 4 / 8:g} \(linear", printed)


def test_check_reports_the_class_counts_of_a_long_tail(capsys):
    checked("--data.longtail=ExponentialTail", "--data.longtail.imbalance=0.02")
    assert "106 68 44 28 18 12 7 5 3 2 (imbalance 0.019)" in capsys.readouterr().out
