"""wandb as the logger: configuration, curves, table and student get there, and no key is asked for."""

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
    """A user without a key, in a folder of their own, whose wandb begins anew."""
    wandb.teardown()  # what an earlier test in this process left
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "online")  # so that what the run sets is taken back
    monkeypatch.delenv("WANDB_MODE")
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "NETRC", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def records(folder):
    """What wandb has written down for its server, by the kind of record: a log in LevelDB's format, of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    found = {}
    place, whole = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # the end of a block, without room for a header
            place += left
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        place += 7 + length
        whole = (whole if part in (3, 4) else b"") + content[place - length : place]
        if part in (1, 4):  # a record in one part, or its last part
            record = Record()
            record.ParseFromString(whole)
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
    return found


def test_without_a_key_a_run_is_logged_offline_with_all_it_has(tmp_path):
    with pytest.warns(UserWarning, match="wandb has no API key, so this run is logged offline"):
        cli = run(["fit", *TINY, *TEACHER, *KD, *WANDB, "--model.heads.kd.weight=0.25"])
    found = records(tmp_path / "run")
    history = [item for record in found["history"] for item in record.item]
    curves = {item.key or ".".join(item.nested_key) for item in history}
    assert {"train/task", "train/kd", "train/kd_weight", "train/kd_weighted", "train/loss", "val/top1"} <= curves
    assert "results.path" in curves, "the final table"
    config = {item.key: json.loads(item.value_json) for record in found["config"] for item in record.update}
    assert config["model"]["heads"]["kd"]["weight"] == 0.25
    (student,) = [artifact for artifact in found["artifact"] if artifact.type == "model"]
    (entry,) = [entry for entry in student.manifest.contents if entry.path == "student.safetensors"]
    weights = load_file(entry.local_path)
    assert weights.keys() == cli.model.student.model.state_dict().keys()
    assert found["run"][0].project == "distill"
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
