"""wandb as the logger: configuration, metrics, results and student are logged, without a prompt for a key."""

import json
import os
import struct

import pytest
import wandb
import yaml
from safetensors.torch import load_file

from distill.cli.program import run
from tests.program import KD, TEACHER, TINY

WANDB = ["--trainer.logger=WandbLogger", "--trainer.default_root_dir=run", "--trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def no_key(tmp_path, monkeypatch):
    """A user without an API key in an empty folder, with a new wandb."""
    wandb.teardown()  # an earlier test in this process may have left its state
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "online")  # so that the value set by the run is undone
    monkeypatch.delenv("WANDB_MODE")
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "NETRC", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def records(folder):
    """Read wandb's records for its server, by kind, from a log of protobufs in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    by_kind = {}
    position, data = 7, b""
    while position + 7 <= len(content):
        if (rest := 32768 - position % 32768) < 7:  # the end of a block, too short for a header
            position += rest
            continue
        _, length, part = struct.unpack_from("<IHB", content, position)
        position += 7 + length
        data = (data if part in (3, 4) else b"") + content[position - length : position]
        if part in (1, 4):  # a record in one part, or its last part
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            by_kind.setdefault(kind, []).append(getattr(record, kind))
    return by_kind


def test_without_a_key_a_complete_run_is_logged_offline(tmp_path):
    with pytest.warns(UserWarning, match="wandb has no API key, so this run is logged offline"):
        cli = run(["fit", *TINY, *TEACHER, *KD, *WANDB, "--model.heads.kd.weight=0.25"])
    by_kind = records(tmp_path / "run")
    history = [item for record in by_kind["history"] for item in record.item]
    names = {item.key or ".".join(item.nested_key) for item in history}
    assert {"train/task", "train/kd", "train/kd_weight", "train/kd_weighted", "train/loss", "val/top1"} <= names
    assert "results.path" in names, "the final table"
    config = {item.key: json.loads(item.value_json) for record in by_kind["config"] for item in record.update}
    assert config["model"]["heads"]["kd"]["weight"] == 0.25
    (student,) = [artifact for artifact in by_kind["artifact"] if artifact.type == "model"]
    (entry,) = [entry for entry in student.manifest.contents if entry.path == "student.safetensors"]
    weights = load_file(entry.local_path)
    assert weights.keys() == cli.model.student.model.state_dict().keys()
    assert by_kind["run"][0].project == "distill"
    assert (
        yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["logger"]["init_args"]["offline"] is False
    )


@pytest.mark.slow
def test_a_disabled_wandb_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cli = run(["fit", *TINY, *WANDB])
    assert cli.trainer.global_step == 2
    assert not list(tmp_path.rglob("*.wandb"))
    assert os.environ["WANDB_MODE"] == "disabled"


@pytest.mark.slow
def test_a_run_resumed_for_a_while_without_wandb_goes_on_with_the_same_run_of_it(tmp_path):
    fit = ["fit", *TINY, "--trainer.limit_train_batches=1", "--trainer.default_root_dir=run", "--resume"]
    for epochs, logger in enumerate((["--trainer.logger=WandbLogger"], ["--trainer.logger=false"]), 1):
        run([*fit, *logger, f"--trainer.max_epochs={epochs}"])
    again = run([*fit, "--trainer.logger=WandbLogger", "--trainer.max_epochs=3"])
    (first,) = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "run/wandb").glob("offline-run-*")}
    assert again.trainer.logger.version == first
