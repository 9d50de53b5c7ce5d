"""`--resume` continues in the run's folder, which ends with the same files as an uninterrupted run."""

import json
import os
import resource
import shutil

import pytest
import torch
import yaml

from distill.__main__ import main
from distill.cli.program import run
from distill.files import write_atomic
from distill.runs.checkpoints import latest_valid_checkpoint
from distill.runs.resume import changes
from tests.program import TEACHER, TINY
from tests.runs.test_resume import RUN, assert_equal_bits, weights

FIT = ["fit", *RUN, "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=2", "--resume"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run([*FIT, f"--trainer.default_root_dir={folder}"])
    return folder


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """Return a function that makes the folder of a run killed some time after a checkpoint."""

    def at(step):
        folder = tmp_path / "run"
        shutil.copytree(undisturbed, folder)
        for path in (folder / "checkpoints").iterdir():
            if path.stem == "last" or int(path.stem.removeprefix("step=")) > step:
                path.unlink()
        (folder / "results.json").unlink()
        lose_later_rows(folder, latest_valid_checkpoint(folder / "checkpoints")[1])
        return folder

    return at


def lose_later_rows(folder, checkpoint):
    """Leave those rows of the metrics that were written when a checkpoint was saved."""
    header, *rows = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join([header, *rows[: checkpoint["interrupted"]["metrics_file"]["rows"]]]))


def figures(folder):
    """Return the results that must not depend on interruptions."""
    content = json.loads((folder / "results.json").read_text())
    return {name: content[name] for name in ("last", "best", "steps", "epochs", "seed", "effective_batch", "monitor")}


def assert_alike(folder, undisturbed):
    assert_equal_bits(weights(folder / "checkpoints/last.ckpt"), weights(undisturbed / "checkpoints/last.ckpt"))
    assert (folder / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()
    assert figures(folder) == figures(undisturbed)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "step", [4, pytest.param(12, marks=pytest.mark.slow)]
)  # in an epoch; before the validation at its end
def test_a_resumed_run_equals_an_uninterrupted_one(undisturbed, stopped, step):
    folder = stopped(step)
    run([*FIT, f"--trainer.default_root_dir={folder}"])
    assert_alike(folder, undisturbed)


ACCUMULATE = ["--trainer.accumulate_grad_batches=4", "--checkpoint.every_n_train_steps=100"]


def test_sigterms_during_accumulation_lose_no_gradient_and_no_metric_of_the_epoch(tmp_path):
    fit = [*FIT, *ACCUMULATE, "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=2"]
    fit += ["--trainer.callbacks+=tests.signals.LogOverEpochs"]
    run([*fit, f"--trainer.default_root_dir={tmp_path / 'undisturbed'}"])
    fit += ["--trainer.callbacks+=tests.signals.TermInAccumulation", "--trainer.callbacks.batch=6"]
    fit += ["--trainer.callbacks.again=8", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    for step in (4, 5):  # both in the second epoch, in the first of two batches
        with pytest.raises(SystemExit) as end:
            main(fit)
        assert end.value.code == 143
        saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == step
        assert not saved["interrupted"]["is_accumulating"]
    assert main(fit) == 0
    assert_alike(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_validation_during_accumulation_loses_no_gradient(tmp_path):
    """The best checkpoint is then saved between two optimizer steps, and is none to resume from."""
    fit = [
        *FIT,
        *ACCUMULATE,
        "--trainer.val_check_interval=3",
        "--checkpoint.monitor=val/top1",
        "--checkpoint.mode=min",
    ]
    fit += ["--checkpoint.save_top_k=1", "--checkpoint.filename=best"]
    run([*fit, f"--trainer.default_root_dir={tmp_path / 'undisturbed'}"])
    fit += ["--trainer.plugins=tests.signals.KillAfterSave"]
    while True:
        child = os.fork()
        if child == 0:
            os._exit(main([*fit, "--trainer.plugins.save=2", f"--trainer.default_root_dir={tmp_path / 'run'}"]))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
    assert_alike(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_a_start_that_fails_before_training_leaves_nothing_behind(tmp_path, monkeypatch, hook):
    monkeypatch.chdir(tmp_path)
    fail = ["--trainer.callbacks+=tests.signals.FailBefore", f"--trainer.callbacks.hook={hook}"]
    with pytest.raises((AttributeError, SystemExit)):
        raise SystemExit(main(["fit", *TINY, *fail]))
    assert list(tmp_path.iterdir()) == []
    assert main(["fit", *TINY, "--model.heads.kd.head=KD"]) == 2  # without a teacher
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 6])  # in an epoch; at the end of one
def test_a_plateau_scheduler_misses_no_step(step, tmp_path):
    plateau = ["--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor=val/top1"]
    plateau += ["--model.scheduler.mode=max", "--model.scheduler.patience=0", "--model.scheduler.threshold=9"]
    fit = ["fit", *TINY, *plateau, "--trainer.max_epochs=4", "--trainer.limit_train_batches=3", "--resume"]
    fit += ["--checkpoint.save_top_k=-1", "--checkpoint.filename={step}", "--trainer.log_every_n_steps=1"]
    fit += ["--checkpoint.every_n_train_steps=2"] if step == 4 else []
    uninterrupted = run([*fit, f"--trainer.default_root_dir={tmp_path / 'undisturbed'}"])
    assert uninterrupted.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**3), (
        "the learning rate decayed three times"
    )
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").iterdir():
        if path.name != f"step={step}.ckpt":
            path.unlink()
    run([*fit, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert_alike(tmp_path / "run", tmp_path / "undisturbed")


def test_a_truncated_checkpoint_is_skipped_with_a_warning_that_names_it(undisturbed, stopped):
    folder = stopped(16)
    newest = folder / "checkpoints/step=16.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"step=16.ckpt' is truncated or not a checkpoint .*: skipping it"):
        run([*FIT, f"--trainer.default_root_dir={folder}"])
    assert_alike(folder, undisturbed)


def test_resuming_a_complete_run_changes_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    run([*FIT, f"--trainer.default_root_dir={folder}"])
    assert_alike(folder, undisturbed)


@pytest.mark.parametrize(
    ("callback", "step", "saved"),
    [
        pytest.param("TermAfterBatch", 3, 4, id="in an epoch", marks=pytest.mark.slow),
        pytest.param("TermAfterBatch", 5, 6, id="before a validation", marks=pytest.mark.slow),
        pytest.param("TermInValidation", 6, 6, id="in a validation"),
    ],
)
def test_a_run_saves_its_state_at_sigterm_and_resumes_there(undisturbed, callback, step, saved, tmp_path):
    folder = tmp_path / "run"
    command = [
        *FIT,
        "--checkpoint.every_n_train_steps=100",
        f"--trainer.callbacks+=tests.signals.{callback}",
        f"--trainer.callbacks.step={step}",
        f"--trainer.default_root_dir={folder}",
    ]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 143
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == saved
    assert not (folder / "results.json").exists()
    assert main(command) == 0
    assert_alike(folder, undisturbed)


def test_a_full_disk_keeps_the_last_valid_checkpoint_and_is_reported_in_one_sentence(undisturbed, stopped, capsys):
    folder = stopped(12)
    before = {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(map(len, before.values())) // 2, limits[1]))
    try:
        code = main([*FIT, f"--trainer.default_root_dir={folder}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert code == 2, message
    assert "step=12.ckpt' (" in message
    assert "could not be written (File too large); earlier checkpoints are intact" in message
    assert "Traceback" not in message
    assert {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before
    run([*FIT, f"--trainer.default_root_dir={folder}"])
    assert_alike(folder, undisturbed)


def test_resuming_with_another_configuration_names_the_changes_and_writes_nothing(stopped, capsys):
    folder = stopped(12)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    different = ["--model.heads.rrd.weight=2", "--data.batch_size=8", "--trainer.max_epochs=2"]
    assert main([*FIT, *different, f"--trainer.default_root_dir={folder}"]) == 2
    message = capsys.readouterr().err
    for change in ("model.heads.rrd.weight is 2.0, was 1.0", "data.batch_size is 8, was 16", "max_epochs is 2, was 3"):
        assert change in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_can_be_extended(stopped):
    folder = stopped(18)
    cli = run([*FIT, "--trainer.max_epochs=4", f"--trainer.default_root_dir={folder}"])
    assert cli.trainer.global_step == 24
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 4


def test_without_a_folder_the_latest_run_is_resumed(tmp_path, monkeypatch, undisturbed):
    monkeypatch.chdir(tmp_path)
    for number in (1, 9, 10):
        shutil.copytree(undisturbed, tmp_path / f"runs/run-{number}")
    cli = run(FIT)
    assert cli.run_folder.name == "run-10"
    assert cli.trainer.global_step == 18
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_resume_excludes_ckpt_path(undisturbed, capsys):
    assert main([*FIT, f"--ckpt_path={undisturbed / 'checkpoints/last.ckpt'}"]) == 2
    assert "resume: it finds the checkpoint itself, but ckpt_path is given too" in capsys.readouterr().err


def truncate(folder):
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1000])


def make_foreign(folder):
    for path in (folder / "checkpoints").iterdir():
        torch.save({"state_dict": {}}, path)


def remove_checkpoints(folder):
    shutil.rmtree(folder / "checkpoints")


def keep_only_metrics(folder):
    remove_checkpoints(folder)
    (folder / "results.json").unlink()


def keep_only_results(folder):
    remove_checkpoints(folder)
    for name in ("config.yaml", "metrics.csv"):
        (folder / name).unlink()


def make_results_foreign(folder):
    (folder / "results.json").write_text('{"accuracy": 1.0}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            truncate,
            "no checkpoint in '{0}/checkpoints' can be resumed (last.ckpt, step=10.ckpt, step=12.ckpt and 7 more)",
        ),
        (make_foreign, "no checkpoint in '{0}/checkpoints' can be resumed (last.ckpt, "),
        (remove_checkpoints, "'{0}' holds a run without a checkpoint to resume (only metrics.csv, results.json)"),
        (keep_only_metrics, "'{0}' holds a run without a checkpoint to resume (only metrics.csv)"),
        (keep_only_results, "'{0}' holds a run without a checkpoint to resume (only results.json)"),
        (make_results_foreign, "'{0}/results.json' was not written by distill"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_rejected_and_not_changed(undisturbed, damage, message, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([*FIT, f"--trainer.default_root_dir={folder}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.format(folder) in error
    assert "to start over, give another trainer.default_root_dir or move the existing files" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("moved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_not_begun_again_if_its_checkpoints_are_in_another_folder(moved, tmp_path, monkeypatch, capsys):
    """The run is one without `metrics.csv`, which would be refused anyway."""
    monkeypatch.chdir(tmp_path)
    fit = ["fit", *TINY, "--trainer.logger=false", "--trainer.default_root_dir=run"]
    of_the_run = ["--checkpoint.dirpath=kept"] if moved else []
    run([*fit, *of_the_run])
    (tmp_path / "run/results.json").unlink()
    given = [] if moved else ["--checkpoint.dirpath=elsewhere"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*fit, *given, "--resume"]) == 2
    kept = "kept" if moved else "run/checkpoints"
    assert f"the run in 'run' keeps its own in '{kept}'; give that folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main([*fit, *of_the_run, "--resume", "--trainer.max_epochs=2"]) == 0


def test_a_run_that_began_from_a_checkpoint_is_not_begun_again_without_it(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("ckpt_path: other/last.ckpt\n")
    assert main(["fit", *TINY, f"--trainer.default_root_dir={tmp_path}", "--resume"]) == 2
    assert "holds a run that began from 'other/last.ckpt' and has saved no checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("resume", [True, False])
def test_the_checkpoints_of_another_run_are_not_overwritten(undisturbed, resume, tmp_path, capsys):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(undisturbed / "checkpoints", checkpoints)
    before = {path: path.read_bytes() for path in checkpoints.iterdir()}
    folder = tmp_path / "run"
    command = FIT if resume else FIT[:-1]
    assert main([*command, f"--checkpoint.dirpath={checkpoints}", f"--trainer.default_root_dir={folder}"]) == 2
    assert f"checkpoint.dirpath: '{checkpoints}' holds the checkpoints of another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in checkpoints.iterdir()} == before
    assert not folder.exists()


def test_a_folder_with_foreign_results_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main([*FIT[:-1], f"--trainer.default_root_dir={tmp_path}"]) == 2
    assert "already holds a run and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_checkpoint_of_weights_only_cannot_be_resumed(tmp_path):
    torch.save({"state_dict": {}, "distill": {}}, tmp_path / "new.ckpt")
    assert latest_valid_checkpoint(tmp_path) is None
    assert latest_valid_checkpoint(tmp_path / "nowhere") is None


BEFORE = {"trainer": {"max_epochs": 3, "max_steps": -1, "callbacks": None, "devices": 1}, "model": {"heads": {}}}


@pytest.mark.parametrize(
    ("section", "now", "expected"),
    [
        ("trainer", {"max_epochs": 4}, []),
        ("trainer", {"max_epochs": -1}, []),
        ("trainer", {"max_epochs": 2}, ["trainer.max_epochs is 2, was 3"]),
        ("trainer", {"max_steps": 9}, ["trainer.max_steps is 9, was -1"]),
        ("trainer", {"devices": 2}, ["trainer.devices is 2, was 1"]),
        ("trainer", {"logger": {"class_path": "WandbLogger"}, "log_every_n_steps": 7}, []),
        ("trainer", {"callbacks": [{"class_path": "distill.callbacks.HeadPictures"}]}, []),
        (
            "trainer",
            {"callbacks": [{"class_path": "EMAWeightAveraging"}]},
            ["trainer.callbacks is [{'class_path': 'EMAWeightAveraging'}], was None"],
        ),
        ("model", {"heads": {"kd": {"weight": 1.0}}}, ["model.heads.kd.weight is 1.0, was absent"]),
    ],
)
def test_only_settings_that_influence_training_are_changes(section, now, expected):
    assert changes(BEFORE, {**BEFORE, section: {**BEFORE[section], **now}}) == expected


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_atomic(tmp_path / "kept", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(tmp_path / "kept", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_a_checkpoint_of_version_0_1_is_refused_in_a_sentence_that_says_so(tmp_path, capsys):
    old = {"state_dict": {"student.model.fc.bias": torch.zeros(10)}, "distill": {"num_classes": 10}, "loops": {}}
    torch.save(old, tmp_path / "old.ckpt")
    assert main([*FIT[:-1], f"--ckpt_path={tmp_path / 'old.ckpt'}"]) == 2
    assert "old.ckpt' was written by distill 0.1, whose checkpoints this version cannot read" in capsys.readouterr().err


def test_lightnings_names_of_checkpoints_are_read_as_safely_as_paths(undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("last", "hpc"):
        assert main(["test", *TINY, f"--ckpt_path={name}", "--trainer.default_root_dir=."]) == 2
        assert f"ckpt_path: there is no checkpoint '{name}' in " in capsys.readouterr().err
    for file in ("checkpoints/last.ckpt", "hpc_ckpt_3.ckpt"):
        torch.save({"state_dict": {}, "code": Foreign()}, tmp_path / file)
    for name in ("last", "hpc", "best"):
        assert main(["test", *TINY, f"--ckpt_path={name}", "--trainer.default_root_dir=."]) == 2
        assert ".ckpt' is truncated or not a checkpoint (Weights only load failed" in capsys.readouterr().err
    assert main(["test", *TINY, *TEACHER, "--ckpt_path=last", f"--trainer.default_root_dir={undisturbed}"]) == 0
    hpc = torch.load(undisturbed / "checkpoints/last.ckpt", weights_only=True)
    torch.save(hpc, tmp_path / "hpc_ckpt_10.ckpt")
    assert main(["test", *TINY, *TEACHER, "--ckpt_path=hpc", "--trainer.default_root_dir=."]) == 0


SLURM = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}


@pytest.mark.slow
def test_on_slurm_a_run_writes_into_its_own_folder_and_loads_nothing_that_was_not_asked_for(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, value in {**SLURM, "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    run(["fit", *TINY, "--trainer.callbacks=tests.signals.RequeueAfterBatch"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    saved = tmp_path / "runs/run-1/hpc_ckpt_1.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 1
    assert run(["validate", *TINY, "--ckpt_path=hpc"]).trainer.ckpt_path == "runs/run-1/hpc_ckpt_1.ckpt"
    shutil.copy(saved, tmp_path)
    assert run(["validate", *TINY]).trainer.ckpt_path is None
    assert run(["fit", *TINY]).trainer.ckpt_path is None
    for resume in ([], ["--resume"]):
        assert main(["fit", *TINY, *resume, "--trainer.default_root_dir=."]) == 2
        assert "holds a run" in capsys.readouterr().err


def test_a_process_that_is_not_the_first_of_a_run_does_not_train_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NODE_RANK", "1")
    assert main(["fit", *TINY]) == 2
    assert "trainer.devices: this process trains alone, but a variable of its environment" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Foreign:
    """An object that a checkpoint must not load."""
