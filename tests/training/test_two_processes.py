"""The real command line on two processes gives what it gives on one."""

import re

import pytest
import torch

from tests.program import TINY, in_a_process

pytestmark = pytest.mark.slow

NETWORKS = [  # without BatchNorm, whose statistics are each rank's own
    "--model.student.name=test_vit",
    "--model.teacher=Timm",
    "--model.teacher.name=test_vit2",
]
HEADS = [
    "--model.heads.kd.head=KD",
    "--model.heads.rkd.head=RKD",
    "--model.heads.rrd.head=RRD",
    "--model.heads.rrd.head.size=32",  # two batches: which half of one is overwritten would depend on the order
]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The checkpoints of a run on one process with batches of 16, and of one on two with batches of 8."""
    found = {}
    for name, extra in (("one", ["--data.batch_size=16"]), ("two", ["--data.batch_size=8", *TWO])):
        folder = tmp_path_factory.mktemp(name)
        done = in_a_process(
            "fit",
            *TINY,
            *NETWORKS,
            *HEADS,
            *extra,
            "--trainer.limit_train_batches=4",
            f"--trainer.default_root_dir={folder}/run",
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
        found[name] = folder / "run/checkpoints/last.ckpt"
    return found


def test_two_processes_train_the_same_student_and_hold_the_same_memory(runs):
    one, two = (torch.load(runs[name], weights_only=True)["state_dict"] for name in ("one", "two"))
    for name in one:
        if name == "distiller.objective.heads.rrd.queue.rows":  # the ranks' samples come in another order
            one[name], two[name] = (rows[name][rows[name][:, 0].argsort()] for rows in (one, two))
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)


def test_two_processes_count_no_test_image_twice(runs, tmp_path):
    figures = []
    for extra in ([], TWO):
        done = in_a_process(
            "test",
            *TINY,
            *NETWORKS,
            *extra,
            "--trainer.limit_test_batches=1.0",
            f"--ckpt_path={runs['one']}",
            cwd=tmp_path,
            COLUMNS="200",
        )
        assert done.returncode == 0, done.stderr
        figures.append(dict(re.findall(r"(test/\w+)\W+([\d.]+)", done.stdout)))
    assert figures[0].keys() >= {"test/top1", "test/top5", "test/calibration_error", "test/agreement"}
    for name, figure in figures[0].items():
        assert float(figures[1][name]) == pytest.approx(float(figure), rel=1e-5), name
