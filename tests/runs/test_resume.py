"""A killed and resumed run ends with the weights of an uninterrupted run bit for bit."""

import os
import signal
import time

import pytest
import torch

from distill.__main__ import main
from distill.cli.program import run
from tests.program import TEACHER, TINY

TWO = ("one", 1.0), ("two", 5.0)
HEADS = ["--model.heads.kd.head=KD", "--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=100"]
RUN = [
    *TINY,
    *TEACHER,
    *HEADS,
    "--model.student.options={drop_path_rate: 0.2, drop_rate: 0.3}",
    "--data.mixing.mixup=0.4",
    "--data.mixing.cutmix=0.4",
    "--data.repetitions=2",
    "--trainer.callbacks=EMAWeightAveraging",
    "--trainer.callbacks.decay=0.8",
    "--model.scheduler=Warmup",
    "--model.scheduler.steps=7",
    "--trainer.max_epochs=3",
    "--trainer.limit_train_batches=6",
    "--checkpoint.every_n_train_steps=2",
    "--checkpoint.monitor=null",
    "--checkpoint.save_top_k=-1",
    "--checkpoint.filename={step}",
]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal_bits(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, among them {different[:3]}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(["fit", *RUN, f"--trainer.default_root_dir={folder}"])
    return folder / "checkpoints"


@pytest.mark.parametrize("step", [4, 14, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 6, 8))])
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits(undisturbed, step, tmp_path):
    checkpoint = undisturbed / f"step={step}.ckpt"
    torch.rand(step)  # a different global random state when the run resumes
    run(["fit", *RUN, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={checkpoint}"])
    actual, expected = weights(tmp_path / "checkpoints/last.ckpt"), weights(undisturbed / "last.ckpt")
    assert "distiller.objective.heads.rrd.queue.rows" in actual
    current = torch.load(undisturbed / "last.ckpt", weights_only=True)["current_model_state"]
    assert any(not torch.equal(current[name], expected[name]) for name in current), (
        "the averaged weights differ from the current ones"
    )
    assert_equal_bits(actual, expected)


def test_a_run_killed_within_an_epoch_resumes_where_it_stopped(undisturbed, tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(main(["fit", *RUN, f"--trainer.default_root_dir={tmp_path}"]))
    deadline = time.monotonic() + 240
    while not (tmp_path / "checkpoints/step=8.ckpt").exists():  # in the second of three epochs
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    kept = sorted((tmp_path / "checkpoints").glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    run(["fit", *RUN, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={kept[0]}"])
    assert_equal_bits(weights(tmp_path / "resumed-1/checkpoints/last.ckpt"), weights(undisturbed / "last.ckpt"))


def killed_at_its_first_checkpoint(command):
    child = os.fork()
    if child == 0:
        os._exit(main([*command, "--trainer.plugins=tests.signals.KillAfterFirstSave"]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return [*command, "--trainer.plugins=tests.signals.KillAfterFirstSave", "--resume"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6, 8, 12, 14])
def test_a_run_killed_right_after_it_began_from_another_ones_checkpoint_resumes_there(undisturbed, step, tmp_path):
    command = ["fit", *RUN, f"--trainer.default_root_dir={tmp_path}"]
    again = killed_at_its_first_checkpoint([*command, f"--ckpt_path={undisturbed / f'step={step}.ckpt'}"])
    (only,) = (tmp_path / "checkpoints").iterdir()
    assert only.name == "last.ckpt"
    assert torch.load(only, weights_only=True)["global_step"] == step
    run([word for word in again if not word.startswith("--ckpt_path")])
    assert_equal_bits(weights(tmp_path / "checkpoints/last.ckpt"), weights(undisturbed / "last.ckpt"))


@pytest.mark.slow
def test_a_plateau_scheduler_steps_once_however_often_a_run_is_resumed_at_the_end_of_an_epoch(tmp_path):
    plateau = ["--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor=val/top1"]
    plateau += ["--model.scheduler.mode=max", "--model.scheduler.patience=1", "--model.scheduler.threshold=9"]
    fit = ["fit", *TINY, *plateau, "--trainer.max_epochs=5"]
    fit += ["--checkpoint.save_top_k=-1", "--checkpoint.filename={step}"]
    whole = run([*fit, f"--trainer.default_root_dir={tmp_path / 'whole'}"])
    command = [*fit, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    again = killed_at_its_first_checkpoint([*command, f"--ckpt_path={tmp_path / 'whole/checkpoints/step=4.ckpt'}"])
    resumed = run([word for word in again if not word.startswith("--ckpt_path")])
    states = [cli.trainer.lr_scheduler_configs[0].scheduler.state_dict() for cli in (whole, resumed)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.heads.rrd.head.size=50", "the queue (size x width) is 100 x 128 in the checkpoint and 50 x 128"),
        ("--model.heads.rrd.head.width=64", "is 100 x 128 in the checkpoint and 100 x 64 in the configuration"),
    ],
)
def test_resuming_with_another_memory_size_is_rejected_without_changes(undisturbed, option, message, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    checkpoint = f"--ckpt_path={undisturbed / 'step=8.ckpt'}"
    assert main(["fit", *RUN, checkpoint, option, f"--trainer.default_root_dir={tmp_path / 'new'}"]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_heads_in_another_order_keep_their_own_optimizer_state(tmp_path):
    adapters = [[f"--model.heads.{name}.head=FitNet", f"--model.heads.{name}.weight={weight}"] for name, weight in TWO]
    fit = ["fit", *TINY, *TEACHER]
    fit += ["--model.optimizer.momentum=0.9", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=0"]
    for folder, order in (("alike", adapters), ("reversed", adapters[::-1])):
        for epochs, heads in ((1, adapters), (2, order)):
            length = [f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={tmp_path / folder}", "--resume"]
            run([*fit, *(word for head in heads for word in head), *length])
    assert_equal_bits(*(weights(tmp_path / folder / "checkpoints/last.ckpt") for folder in ("reversed", "alike")))
