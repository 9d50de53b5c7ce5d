"""A run killed twenty times at random moments equals an uninterrupted run bit for bit."""

import os
import random
import signal
import time

import pytest
import torch

from tests.fork_server import ForkServer, is_over, wait_for
from tests.program import KD, TEACHER, TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 20
COMMAND = [
    *("fit", "--resume", *TINY, *TEACHER, *KD),
    *("--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=100"),
    *("--model.heads.rkd.head=RKD", "--model.heads.rkd.weight=Warmup", "--model.heads.rkd.weight.value=1.0"),
    *("--model.heads.rkd.weight.steps=40", "--model.student.options={drop_path_rate: 0.2, drop_rate: 0.3}"),
    *("--model.optimizer=AdamW", "--model.optimizer.lr=0.001", "--model.scheduler=Cosine"),
    *(
        "--model.scheduler.start=1.0",
        "--model.scheduler.end=0.0",
        "--data.mixing.mixup=0.4",
        "--data.mixing.cutmix=0.4",
    ),
    *("--data.repetitions=2", "--data.num_workers=1", "--trainer.callbacks=EMAWeightAveraging"),
    *("--trainer.callbacks.decay=0.9", "--trainer.max_epochs=6", "--trainer.limit_train_batches=20"),
    *("--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1", "--checkpoint.every_n_train_steps=3"),
]


def test_twenty_kills_change_no_bit(tmp_path):
    server = ForkServer(tmp_path)
    start = time.monotonic()
    assert server.run([*COMMAND, "--trainer.default_root_dir=undisturbed"]) == 0, server.errors
    duration = time.monotonic() - start
    generator = random.Random(7)
    disturbed = [*COMMAND, "--trainer.default_root_dir=disturbed"]
    checkpoints = tmp_path / "disturbed/checkpoints"
    kills = during_a_write = 0
    while kills < KILLS:
        process = server.start(disturbed)
        if kills % 4 == 3:  # during the write of a checkpoint
            time.sleep(generator.uniform(0.0, 0.2) * duration)
            wait_for(lambda: any(checkpoints.glob("*.part")), process)
        else:
            time.sleep(generator.uniform(0.0, 0.4) * duration)
        if not is_over(process):
            os.killpg(process, signal.SIGKILL)
        code = server.code(process)
        assert code in (0, -signal.SIGKILL), server.errors
        if code == 0:  # the run ended before the kill: start again
            os.rename(tmp_path / "disturbed", tmp_path / f"whole-{kills}")
            assert_same(tmp_path / f"whole-{kills}", tmp_path / "undisturbed")
            continue
        kills += 1
        during_a_write += any(checkpoints.glob("*.part"))
    assert server.run(disturbed) == 0, server.errors
    server.close()
    assert during_a_write >= 1
    assert_same(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.parametrize("saves", [2, 3])
def test_kills_between_the_rename_of_a_checkpoint_and_the_log_of_its_step_lose_no_row(saves, tmp_path):
    server = ForkServer(tmp_path)
    fit = [*COMMAND, "--trainer.callbacks+=tests.signals.LogOverEpochs", "--trainer.limit_train_batches=4"]
    fit += ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2", "--checkpoint.every_n_train_steps=1"]
    assert server.run([*fit, "--trainer.default_root_dir=undisturbed"]) == 0, server.errors
    fit += ["--trainer.plugins=tests.signals.KillAfterSave", f"--trainer.plugins.save={saves}"]
    kills = 0
    while (code := server.run([*fit, "--trainer.default_root_dir=disturbed"])) == -signal.SIGKILL:
        kills += 1
    assert code == 0, server.errors
    assert kills > 12 / saves
    server.close()
    assert_same(tmp_path / "disturbed", tmp_path / "undisturbed")


def assert_same(folder, undisturbed):
    paths = (run / "checkpoints/last.ckpt" for run in (folder, undisturbed))
    actual, expected = (torch.load(path, weights_only=True) for path in paths)
    for key in ("state_dict", "current_model_state"):
        different = [name for name in expected[key] if not torch.equal(actual[key][name], expected[key][name])]
        assert not different, f"{key}: {len(different)} tensors differ, among them {different[:3]}"
    assert (folder / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()
