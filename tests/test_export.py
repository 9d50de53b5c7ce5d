"""`distill export`: the student alone gives the module's logits, without this project."""

import os
import re
import resource
import stat
from contextlib import contextmanager

import pytest
import torch

from distill.__main__ import main
from distill.cli.program import run
from distill.export import load_student
from tests.program import KD, TEACHER, TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its checkpoint, a batch, and the module's logits on it."""
    folder = tmp_path_factory.mktemp("run")
    cli = run(["fit", *TINY, *TEACHER, *KD, f"--trainer.default_root_dir={folder}"])
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = cli.model.eval()(image)
    return folder / "checkpoints/last.ckpt", image, logits


def test_the_student_comes_back_from_the_checkpoint_alone(trained):
    checkpoint, image, logits = trained
    with torch.no_grad():
        assert torch.equal(load_student(checkpoint)(image)["logits"], logits)


def test_the_printed_lines_load_the_exported_weights_with_timm_alone(trained, tmp_path, capsys):
    checkpoint, image, logits = trained
    output = tmp_path / "new" / "student.safetensors"
    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={output}"]) == 0
    lines = capsys.readouterr().out
    assert "timm.create_model('test_resnet'" in lines
    assert "distill" not in lines
    scope = {"image": image}
    with torch.no_grad():
        exec(lines, scope)
    torch.testing.assert_close(scope["logits"], logits)


@pytest.mark.slow
def test_onnx_gives_the_same_logits_at_any_batch_size(trained, tmp_path, capsys):
    checkpoint, image, logits = trained
    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path}/a.onnx", "--format=onnx"]) == 0
    scope = {"image": image.numpy()}
    exec(
        capsys.readouterr()
        .out.split("[torch.onnx]")[-1]
        .partition("import onnxruntime")[2]
        .join(["import onnxruntime", ""]),
        scope,
    )
    torch.testing.assert_close(torch.from_numpy(scope["logits"]), logits, rtol=1e-4, atol=1e-4)


def test_a_torch_program_gives_the_same_logits_at_any_batch_size(trained, tmp_path, capsys):
    checkpoint, image, logits = trained
    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path}/a.pt2", "--format=torch"]) == 0
    scope = {"image": image}
    exec(capsys.readouterr().out, scope)
    torch.testing.assert_close(scope["logits"], logits)


def test_an_existing_file_is_not_overwritten(trained, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_text("mine")
    assert main(["export", f"--ckpt_path={trained[0]}", f"--output={tmp_path}/a.safetensors"]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "a.safetensors").read_text() == "mine"


FORMATS = ["safetensors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "onnx"))]


@contextmanager
def files_of_at_most(size: int):
    """No file can be written beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing_and_a_file_has_ordinary_permissions(format, trained, tmp_path, capsys):
    arguments = ["export", f"--ckpt_path={trained[0]}", f"--output={tmp_path}/new/folder/a", f"--format={format}"]
    with files_of_at_most(64 * 1024):
        assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"distill: output: '.*/new/folder/a' \(\S+ MiB\) cannot be written \(File too large\).*", error)
    assert not list(tmp_path.iterdir())
    umask = os.umask(0o027)
    try:
        assert main(arguments) == 0
    finally:
        os.umask(umask)
    (file,) = (tmp_path / "new/folder").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_an_interrupt_leaves_nothing(trained, tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["export", f"--ckpt_path={trained[0]}", f"--output={tmp_path}/new/student.safetensors"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_in_the_meantime_is_not_overwritten(trained, tmp_path, monkeypatch, capsys):
    def save(*arguments, **options):
        (tmp_path / "a").write_text("mine")
        return b"weights"

    monkeypatch.setattr("safetensors.torch.save", save)
    assert main(["export", f"--ckpt_path={trained[0]}", f"--output={tmp_path}/a"]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_an_output_below_a_file_is_refused(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", f"--ckpt_path={trained[0]}", f"--output={tmp_path}/file/a"]) == 2
    assert "file', which is a file" in capsys.readouterr().err


def test_an_output_in_the_home_folder_is_written_there(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", f"--ckpt_path={trained[0]}", "--output=~/a.safetensors"]) == 0
    assert (tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize("args", [["--ckpt_path=nowhere.ckpt", "--output=a"], ["--output=a"], ["--ckpt_pth=a"]])
def test_mistakes_get_one_sentence(args, capsys):
    assert main(["export", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill: ")
    assert len(error.splitlines()) == 1
