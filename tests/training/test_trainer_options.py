"""The options of Lightning's Trainer work on the command line, with sixteen images in one process."""

from __future__ import annotations

import csv
import inspect
import json
import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from distill.__main__ import main
from distill.heads import KD, RKD, RRD
from distill.networks.torch_module import TorchModule
from distill.objective import Term
from distill.training.ddp import _has_unused_parameters
from distill.training.distillation import DistillationModule
from distill.training.loading import STUDENT
from tests.nets import Plain
from tests.training.test_modules import SETTINGS

SIXTEEN = {
    "data": "Digits",
    "data.batch_size": 4,
    "model.student": "TorchModule",
    "model.student.module": "tests.nets.Plain",
    "model.optimizer": "SGD",
    "model.optimizer.lr": 0.01,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 4,
    "trainer.limit_val_batches": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}
FEATURES_ONLY = {
    "model.task.weight": 0,
    "model.teacher": "TorchModule",
    "model.teacher.module": "tests.nets.Plain",
    "model.heads.rkd.head": "RKD",
}

# Values of each argument of the Trainer: one of this option, or several options. A further option is a further line.
OPTIONS = {
    "accelerator": ["auto"],
    "strategy": ["ddp", "ddp_find_unused_parameters_true"],
    "devices": ["1", "auto"],
    "num_nodes": ["1"],
    "precision": ["64-true", "bf16-mixed", "bf16-true", "16-mixed"],
    "logger": ["false", "true", "CSVLogger"],
    "callbacks": ["LearningRateMonitor", "EMAWeightAveraging", "RichModelSummary"],
    "fast_dev_run": ["true", "2"],
    "max_epochs": ["2"],
    "min_epochs": ["1"],
    "max_steps": ["3"],
    "min_steps": ["2"],
    "max_time": ["00:00:10:00"],
    "limit_train_batches": ["3", "0.02"],
    "limit_val_batches": ["0", "0.05"],
    "limit_test_batches": ["2"],
    "limit_predict_batches": ["2"],
    "val_check_interval": ["2", "0.5", {"trainer.val_check_interval": 3, "trainer.check_val_every_n_epoch": "null"}],
    "check_val_every_n_epoch": ["2"],
    "num_sanity_val_steps": ["0", "-1"],
    "log_every_n_steps": ["1", "0"],
    "enable_checkpointing": ["false"],
    "enable_progress_bar": ["true"],
    "enable_model_summary": ["true"],
    "accumulate_grad_batches": ["3"],
    "gradient_clip_val": ["0.5"],
    "gradient_clip_algorithm": [{"trainer.gradient_clip_algorithm": "value", "trainer.gradient_clip_val": 0.5}],
    "deterministic": ["true", "warn"],
    "benchmark": ["true"],
    "inference_mode": ["false"],
    "use_distributed_sampler": ["false"],
    "profiler": ["simple", "SimpleProfiler"],
    "detect_anomaly": ["true"],
    "barebones": [
        {"trainer.barebones": "true", "trainer.enable_progress_bar": "null", "trainer.enable_model_summary": "null"}
    ],
    "plugins": ["lightning.pytorch.plugins.io.TorchCheckpointIO"],
    "sync_batchnorm": ["true"],
    "reload_dataloaders_every_n_epochs": ["1"],
    "default_root_dir": ["elsewhere"],
    "enable_autolog_hparams": ["false"],
    "model_registry": ["models"],
}
LEFT_OUT = {"overfit_batches"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def fit(options=None):
    """Run `distill fit` in this process, in the folder `run`."""
    given = {**SIXTEEN, "trainer.default_root_dir": "run", **(options or {})}
    return main(["fit", *(f"--{key}={value}" for key, value in given.items())])


def curve(folder):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


def steps(folder):
    return json.loads((folder / "run/results.json").read_text())["steps"]


def test_every_argument_of_the_trainer_has_a_row():
    assert inspect.signature(Trainer.__init__).parameters.keys() - {"self"} - LEFT_OUT == OPTIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_an_option_works(name, value):
    assert fit(value if isinstance(value, dict) else {f"trainer.{name}": value}) == 0


def test_a_run_without_checkpoints_writes_everything_else(tmp_path):
    assert fit({"trainer.enable_checkpointing": "false"}) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.csv", "results.json"}


def test_a_barebones_run_trains(tmp_path):
    assert fit(OPTIONS["barebones"][0]) == 0
    assert steps(tmp_path) == 4


def test_a_logger_by_bare_name_writes_into_the_runs_folder(tmp_path):
    assert fit({"trainer.logger": "CSVLogger", "trainer.max_epochs": 2}) == 0
    (folder,) = (tmp_path / "run/lightning_logs").iterdir()
    assert curve(folder).keys() == {3, 7}
    assert "save_dir: run\n" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trainer.max_epochs": 3}, {3, 7, 11}),
        ({"trainer.max_epochs": 2, "trainer.accumulate_grad_batches": 3}, {1, 3}),
    ],
)
def test_a_run_with_short_epochs_has_a_curve(options, expected, tmp_path):
    assert fit(options) == 0
    assert curve(tmp_path / "run").keys() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"), [({"trainer.max_steps": 3}, {2}), ({"trainer.log_every_n_steps": 3}, {2}), ({}, {3})]
)
def test_a_longer_interval_than_the_run_is_shortened_and_no_other(options, expected, tmp_path):
    assert fit(options) == 0
    assert curve(tmp_path / "run").keys() == expected


def test_plain_ddp_trains_with_a_classifier_that_no_term_reads(tmp_path):
    assert fit({**FEATURES_ONLY, "trainer.strategy": "ddp"}) == 0
    assert steps(tmp_path) == 4


@pytest.mark.slow
def test_without_the_detection_ddp_would_stop(tmp_path):
    with pytest.raises(RuntimeError, match="parameters that were not used in producing the loss"):
        fit({**FEATURES_ONLY, "trainer.strategy": "ddp_find_unused_parameters_false"})


def test_a_trial_step_finds_unused_parameters_and_leaves_no_trace():
    def module(**terms):
        networks = {"student": TorchModule(Plain()), "teacher": TorchModule(Plain())}
        return DistillationModule(**networks, heads={"rrd": Term(RRD(size=30, width=4))}, **SETTINGS, **terms)

    whole, without_task = module(), module(task=Term(KD(), 0.0))
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    random = torch.get_rng_state()
    assert not _has_unused_parameters(whole.distiller, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in whole.parameters())
    assert _has_unused_parameters(without_task.distiller, 10)


class Demanding(RKD):
    """A head that cannot work on random images."""

    def tokens(self, features, batch):
        return batch["missing"]


def test_a_trial_step_that_is_not_possible_counts_as_one_with_unused_parameters():
    networks = {"student": TorchModule(Plain()), "teacher": TorchModule(Plain())}
    module = DistillationModule(**networks, heads={"own": Term(Demanding())}, **SETTINGS)
    assert _has_unused_parameters(module.distiller, 10)


@pytest.mark.slow
def test_the_program_continues_under_other_settings_and_exports_either_weights(tmp_path):
    ema = {"trainer.callbacks": "EMAWeightAveraging", "trainer.callbacks.decay": 0.5, "model.student": "Timm"}
    ema |= {"model.student.name": "test_vit", "trainer.log_every_n_steps": 1}
    first = {**SIXTEEN, **ema, "trainer.default_root_dir": "run"}
    del first["model.student.module"]
    assert main(["fit", *(f"--{key}={value}" for key, value in first.items())]) == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    second = first | {"trainer.default_root_dir": "next", "trainer.max_epochs": 2, "model.optimizer.lr": 0.003}
    assert main(["fit", *(f"--{key}={value}" for key, value in second.items()), f"--ckpt_path={last}"]) == 0
    with (tmp_path / "next/metrics.csv").open() as file:
        assert [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]] == pytest.approx([0.003] * 4)
    checkpoint = torch.load(last, weights_only=True)
    for choice, key in (("averaged", "state_dict"), ("current", "current_model_state")):
        arguments = [f"--ckpt_path={last}", f"--output={choice}.safetensors", f"--weights={choice}"]
        assert main(["export", *arguments]) == 0
        tensors = load_file(f"{choice}.safetensors")
        assert all(torch.equal(tensor, checkpoint[key][f"{STUDENT}model.{name}"]) for name, tensor in tensors.items())
