"""`distill store` and the runs that read it, as a user gives them."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import timm
import torch

from distill.__main__ import main
from distill.export import load_student
from distill.runs.lock import FolderLock
from distill.store import StoreIndex
from tests.fork_server import ForkServer, is_over, wait_for
from tests.program import ROOT, in_a_process

DATA = ["--data=tests.training.stored_runs.Pictures"]
COMMON = [
    *DATA,
    "--model.student=Timm",
    "--model.student.name=test_vit",
    "--model.student.options={patch_size: 8, drop_rate: 0.2}",
    "--model.optimizer=SGD",
    "--model.optimizer.lr=0.05",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FIT = ["--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--checkpoint.every_n_train_steps=2"]
TEACHER = ["--model.teacher=Timm", "--model.teacher.name=test_vit2", "--model.teacher.options={patch_size: 8}"]
RKD = ["--model.heads.rkd.head=RKD"]
RRD = ["--model.heads.rrd.head=RRD", "--model.heads.rrd.head.size=24"]
SERKD = ["--model.heads.serkd.head=SeRKD"]
OWN = ["--model.num_classes=10", "--model.image_shape=[3,32,32]"]
TERMS = [*RKD, *RRD, *SERKD, "--model.heads.kd.head=KD"]


def stored(folder: object = "store") -> list[str]:
    return ["--model.teacher=StoredTeacher", f"--model.teacher.path={folder}"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a store of what `TERMS` compare with, for validation and test images, too."""
    folder = tmp_path_factory.mktemp("shared") / "store"
    assert main(["store", *COMMON, *TEACHER, *TERMS, f"--output={folder}", "--splits", "train", "val", "test"]) == 0
    return folder


def refusal(capsys, *args, command="store"):
    """The sentence that refuses a command."""
    capsys.readouterr()
    code = main([command, *COMMON, *args])
    captured = capsys.readouterr()
    sentences = [line for line in captured.err.splitlines() if line.startswith("distill: ")]
    assert code == 2, captured.err
    assert len(sentences) == 1, captured.err
    assert "Traceback" not in captured.err
    return sentences[0].removeprefix("distill: ")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder):
    return {path: content for path, content in files(folder).items() if path.suffix == ".safetensors"}


def assert_same_runs(first, second):
    checkpoints = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (first, second)]
    for name, value in checkpoints[0]["state_dict"].items():
        assert torch.equal(value, checkpoints[1]["state_dict"][name]), name
    curves = []
    for run in (first, second):
        (path,) = run.rglob("metrics.csv")
        header, *lines = [line.split(",") for line in path.read_text().splitlines()]
        shown = [
            number
            for number, name in enumerate(header)
            if name.startswith("train/") and not name.endswith(("_ms", "per_second", "_gb"))
        ]
        curves.append([[line[number] for number in shown] for line in lines])
    assert curves[0] == curves[1]
    assert any(any(line) for line in curves[0])


def test_a_store_is_written_and_read(shared, tmp_path, capsys):
    index = StoreIndex.read(shared)
    assert set(index.splits) == {"train", "val", "test"}
    for name, teacher in (("live", TEACHER), ("replayed", stored(shared))):
        assert main(["fit", *COMMON, *FIT, *teacher, *TERMS, f"--trainer.default_root_dir={name}"]) == 0
    assert_same_runs(tmp_path / "live", tmp_path / "replayed")
    before = files(shared)
    capsys.readouterr()
    assert main(["store", *COMMON, *TEACHER, *TERMS, f"--output={shared}"]) == 0
    assert ": 0 B written" in capsys.readouterr().out
    assert files(shared) == before


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1", "-1/2", "1/2/3", "1/0"])
def test_a_share_that_is_none_is_refused(shard, capsys, tmp_path):
    said = refusal(capsys, *TEACHER, *RKD, "--output=new", f"--shard={shard}")
    assert said == f"shard must be the number of this process of all, such as 1/4 to 4/4, given {shard!r}"
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_stored_is_refused_and_no_folder_is_left(shared, tmp_path, capsys):
    new = "--output=new"
    assert refusal(capsys, *RKD, new).startswith("model.heads.rkd")
    assert refusal(capsys, new) == "model.teacher is not given: there is nothing to store"
    said = refusal(capsys, *stored(shared), *RKD, new)
    assert said == "model.teacher: this teacher is read from a store: give the network itself"
    said = refusal(capsys, *TEACHER, *RKD, new, "--teacher=first")
    assert said.startswith("teacher: there is no teacher 'first': ")
    assert refusal(capsys, *TEACHER, *RKD, new, "--data.draws=null").startswith("data: data.draws is null")
    said = refusal(capsys, *TEACHER, *RKD, new, "--data.mixing.mixup=0.2")
    assert said.startswith("data: data.mixing mixes images by batch")
    said = refusal(capsys, *TEACHER, *RKD, new, "--data=tests.own_data.OwnData", *OWN)
    assert "needs images that are augmented by a key" in said
    said = refusal(capsys, *TEACHER, *RKD, new, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert said.startswith("trainer.devices: a store is written by single processes, not by 2 ranks")
    assert refusal(capsys, *TEACHER, *RKD, new, "--splits=[trian]").startswith("splits")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_whole_maps_are_refused_unless_forced(tmp_path, capsys):
    taps = ["--model.teacher.taps={block: blocks.0}", "--model.student.taps={block: blocks.0}"]
    maps = [*TEACHER, *taps, "--model.heads.fit.head=FitNet", "--model.heads.fit.head.of=[block]"]
    said = refusal(capsys, *maps, "--output=new")
    assert said.startswith("model.heads.fit.head: FitNet compares whole feature maps, which take ")
    assert said.endswith(" in all: leave the term out, or give --force")
    assert [*tmp_path.iterdir()] == []
    assert main(["store", *COMMON, *maps, "--output=new", "--force=true"]) == 0
    for name, teacher in (("live", [*TEACHER, taps[0]]), ("replayed", stored("new"))):
        fit = ["fit", *COMMON, *FIT, *teacher, taps[1], *maps[len(TEACHER) + 2 :]]
        assert main([*fit, f"--trainer.default_root_dir={name}"]) == 0
    assert_same_runs(tmp_path / "live", tmp_path / "replayed")


def test_a_store_for_which_there_is_no_room_is_refused(tmp_path, capsys):
    free = shutil.disk_usage(tmp_path).free
    draws = free // (32 * 16 * 64 * 4) + 1  # tokens of 32 images
    terms = ["--model.heads.tokens.head=TokenRegression", f"--data.draws={draws}"]
    said = refusal(capsys, *TEACHER, *terms, "--output=new")
    assert said.startswith("output: the store needs ")
    assert " more, but the disk of 'new' has " in said
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_store_that_is_being_written_is_left_alone(shared, tmp_path, capsys):
    shutil.copytree(shared, tmp_path / "busy")
    before = rows(tmp_path / "busy")
    lock = FolderLock(tmp_path / "busy")
    try:
        said = refusal(capsys, *TEACHER, *TERMS, "--model.heads.sp.head=SP", "--output=busy")
        assert said.startswith("output: 'busy' is being written by ")
        assert said.endswith(": wait for its end")
        assert rows(tmp_path / "busy") == before
        fit = ["fit", *COMMON, "--trainer.max_steps=1", *stored("busy"), *TERMS, "--trainer.default_root_dir=run"]
        assert main(fit) == 0  # reading needs no lock
    finally:
        lock.release()


@pytest.mark.slow
def test_limits_of_a_short_trial_leave_no_rows_out(tmp_path, shared):
    short = ["--trainer.limit_predict_batches=1", "--trainer.limit_train_batches=1", "--trainer.overfit_batches=1"]
    terms = [*TERMS, "--splits", "train", "val", "test"]
    assert main(["store", *COMMON, *TEACHER, *short, "--output=short", *terms]) == 0
    assert rows(tmp_path / "short") == rows(shared)


@pytest.mark.slow
def test_check_weigh_validate_test_and_export_with_a_stored_teacher(shared, tmp_path, capsys):
    teacher = stored(shared)
    assert main(["check", *COMMON, *teacher, *TERMS]) == 0
    assert "stored rows" in capsys.readouterr().out
    assert main(["weigh", *COMMON, *teacher, *TERMS, "--share=0.5", "--output=weights.yaml"]) == 0
    for name, given in (("live", TEACHER), ("replayed", teacher)):
        assert main(["fit", *COMMON, *FIT, *given, *TERMS, f"--trainer.default_root_dir={name}"]) == 0
    figures = {}
    for command in ("validate", "test"):
        for name, given in (("live", TEACHER), ("replayed", teacher)):
            capsys.readouterr()
            checkpoint = f"--ckpt_path={name}/checkpoints/last.ckpt"
            assert main([command, *COMMON, *given, *TERMS, checkpoint]) == 0
            printed = capsys.readouterr().out
            figures[name] = [line for line in printed.splitlines() if "/" in line and "│" in line]
        assert any("agreement" in line for line in figures["live"])
        assert figures["live"] == figures["replayed"]
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "replayed", moved)
    for run in ("live", "moved"):  # no store is read
        assert main(["export", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--output={run}.safetensors"]) == 0
    students = [load_student(f"{run}/checkpoints/last.ckpt") for run in ("live", "moved")]
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(students[0](image)["logits"], students[1](image)["logits"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.mark.slow
def test_a_killed_store_goes_on_at_the_file_where_it_was(server, tmp_path):
    more = ["--data.images=512", "--data.num_workers=1"]
    command = ["store", *COMMON, *more, *TEACHER, *TERMS]
    assert server.run([*command, f"--output={tmp_path}/whole"]) == 0, server.errors
    kept, kills = {}, 0
    while kills < 3:
        process = server.start([*command, f"--output={tmp_path}/killed"])
        count = len(kept)
        wait_for(lambda: len([*(tmp_path / "killed").rglob("train/*/*.safetensors")]) > count + 5, process)  # noqa: B023
        assert not is_over(process), "the store was complete before its end: give it more images"
        os.killpg(process, signal.SIGKILL)
        assert server.code(process) == -signal.SIGKILL
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
        assert kept.items() <= written.items()
        kept, kills = written, kills + 1
    assert server.run([*command, f"--output={tmp_path}/killed"]) == 0, server.errors
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert (tmp_path / "killed/index.json").read_bytes() == (tmp_path / "whole/index.json").read_bytes()
    assert not [*(tmp_path / "killed").rglob("*.part")]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_two_processes_write_what_one_does(at_once, server, tmp_path):
    command = ["store", *COMMON, *TEACHER, *TERMS, "--data.images=128"]
    assert server.run([*command, f"--output={tmp_path}/one"]) == 0, server.errors
    both = [[*command, f"--output={tmp_path}/two", f"--shard={part}/2"] for part in (2, 1)]
    if at_once:
        processes = [server.start(each) for each in both]
        assert [server.code(process) for process in processes] == [0, 0], server.errors
    else:
        assert [server.run(each) for each in both] == [0, 0], server.errors
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow
def test_a_run_with_a_stored_teacher_killed_and_resumed_equals_the_live_one(server, tmp_path):
    options = [*COMMON, *FIT, *TERMS, "--model.scheduler=Cosine", "--model.scheduler.start=1.0"]
    options += ["--model.scheduler.end=0.0", "--trainer.max_epochs=12", "--data.num_workers=1"]
    store = f"{tmp_path}/store"
    assert server.run(["store", *options, *TEACHER, f"--output={store}"]) == 0, server.errors
    run = ["fit", "--resume", *options]
    assert server.run([*run, *TEACHER, f"--trainer.default_root_dir={tmp_path}/live"]) == 0, server.errors
    killed = [*run, *stored(store), f"--trainer.default_root_dir={tmp_path}/killed"]
    last = tmp_path / "killed/checkpoints/last.ckpt"
    kills = 0
    while kills < 3:
        process = server.start(killed)
        before = last.stat().st_mtime_ns if last.exists() else 0
        wait_for(lambda: last.exists() and last.stat().st_mtime_ns > before, process)  # noqa: B023
        time.sleep(0.03 * kills)
        assert not is_over(process), server.errors
        os.killpg(process, signal.SIGKILL)
        assert server.code(process) == -signal.SIGKILL
        kills += 1
    assert server.run(killed) == 0, server.errors
    assert_same_runs(tmp_path / "live", tmp_path / "killed")


@pytest.mark.slow
def test_two_ranks_agree_with_one(tmp_path):
    terms = [*TERMS, "--model.student.options={patch_size: 8}"]  # dropout draws by rank
    assert main(["store", *COMMON, *TEACHER, *terms, "--output=store"]) == 0
    weights = []
    for devices in (1, 2):
        process = in_a_process(
            "fit",
            *COMMON,
            *FIT,
            "--trainer.max_epochs=1",  # as differences by rounding grow
            "--model.optimizer.lr=0.01",
            *terms,
            *stored("store"),
            "--model.teacher.any_batch_size=true",
            f"--data.batch_size={8 // devices}",
            f"--trainer.devices={devices}",
            f"--trainer.default_root_dir={devices}",
            *(["--trainer.strategy=ddp"] if devices == 2 else []),
            cwd=tmp_path,
        )
        assert process.returncode == 0, process.stderr
        weights.append(torch.load(tmp_path / f"{devices}/checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text
        )


def save_weights(path, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit2", num_classes=5, patch_size=8, img_size=32).state_dict(), path)


@pytest.mark.slow
def test_recomputed_rows_tell_changed_bytes_and_changed_weights(tmp_path, capsys):
    save_weights(tmp_path / "teacher.pth", 1)
    terms = [*RKD, *RRD]
    from_a_file = [*TEACHER, "--model.teacher.weights=teacher.pth"]
    assert main(["store", *COMMON, *from_a_file, *terms, "--output=store"]) == 0
    fit = [*stored(), *terms, "--model.teacher.verify=500", "--trainer.max_steps=1", "--trainer.default_root_dir=run"]
    assert main(["fit", *COMMON, *fit]) == 0

    path = tmp_path / "store/train/embedding/00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the exponent of the last number
    path.write_bytes(content)
    shutil.rmtree("run")
    said = refusal(capsys, *fit, command="fit")
    assert said.startswith("model.teacher: verify: 'embedding' of image ")
    assert "in draw " in said
    assert "is another in the store 'store' than the network computes (by " in said
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["fit", *COMMON, *fit]) == 0

    save_weights(tmp_path / "teacher.pth", 2)
    shutil.rmtree("run")
    said = refusal(capsys, *fit, command="fit")
    assert said.startswith("model.teacher: verify: the store 'store' is of weights ")
    assert said.endswith(": its weights have changed, or were random")
    assert not [*tmp_path.glob("run/checkpoints/*")]


@pytest.mark.slow
def test_rows_of_a_mixed_precision_are_recomputed_in_it(tmp_path, capsys):
    mixed = ["--trainer.precision=bf16-mixed"]
    save_weights(tmp_path / "teacher.pth", 1)
    assert (
        main(["store", *COMMON, *TEACHER, "--model.teacher.weights=teacher.pth", *RKD, *mixed, "--output=store"]) == 0
    )
    fit = [
        *stored(),
        *RKD,
        *mixed,
        "--model.teacher.verify=50",
        "--trainer.max_steps=1",
        "--trainer.default_root_dir=run",
    ]
    assert main(["fit", *COMMON, *fit]) == 0
    path = next(tmp_path.glob("store/train/embedding*/00003.safetensors"))
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    path.write_bytes(content)
    shutil.rmtree("run")
    said = refusal(capsys, *fit, "--model.teacher.verify=500", command="fit")
    assert "is another in the store 'store' than the network computes" in said
