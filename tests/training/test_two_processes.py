"""The real command line gives the same results with two processes as with one."""

import re

import pytest
import torch

from tests.program import TINY, in_a_process

pytestmark = pytest.mark.slow

NETWORKS = [  # without BatchNorm, whose statistics differ between ranks
    "--model.student.name=test_vit",
    "--model.teacher=Timm",
    "--model.teacher.name=test_vit2",
]
HEADS = [
    "--model.heads.kd.head=KD",
    "--model.heads.rkd.head=RKD",
    "--model.heads.rrd.head=RRD",
    "--model.heads.rrd.head.size=40",  # which the batch does not divide
    "--data.mixing.mixup=0.4",
    "--data.mixing.cutmix=0.4",
]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a run in one process with batches of 16 and of a run in two with batches of 8."""
    checkpoints = {}
    for name, extra in (("one", ["--data.batch_size=16"]), ("two", ["--data.batch_size=8", *TWO])):
        folder = tmp_path_factory.mktemp(name)
        process = in_a_process(
            "fit",
            *TINY,
            *NETWORKS,
            *HEADS,
            *extra,
            "--trainer.limit_train_batches=4",
            "--trainer.log_every_n_steps=2",
            f"--trainer.default_root_dir={folder}/run",
            cwd=folder,
        )
        assert process.returncode == 0, process.stderr
        checkpoints[name] = folder / "run/checkpoints/last.ckpt"
    return checkpoints


def test_two_processes_train_the_same_student_and_hold_the_same_memory(runs):
    single, double = (torch.load(runs[name], weights_only=True)["state_dict"] for name in ("one", "two"))
    for name in single:
        torch.testing.assert_close(
            double[name], single[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text
        )


def test_two_processes_count_no_test_image_twice(runs, tmp_path):
    figures = []
    for extra in ([], TWO):
        process = in_a_process(
            "test",
            *TINY,
            *NETWORKS,
            *extra,
            "--trainer.limit_test_batches=1.0",
            f"--ckpt_path={runs['one']}",
            cwd=tmp_path,
            COLUMNS="200",
        )
        assert process.returncode == 0, process.stderr
        figures.append(dict(re.findall(r"(test/\w+)\W+([\d.]+)", process.stdout)))
    assert figures[0].keys() >= {"test/top1", "test/top5", "test/calibration_error", "test/agreement"}
    for name, figure in figures[0].items():
        assert float(figures[1][name]) == pytest.approx(float(figure), rel=1e-5), name
