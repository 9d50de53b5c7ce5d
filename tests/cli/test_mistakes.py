"""Invalid input gives exit code 2 and one sentence on stderr: the key, what was given and what would fit."""

import pytest
import torch
from lightning.fabric.utilities.device_parser import _sanitize_gpu_ids
from lightning.fabric.utilities.exceptions import MisconfigurationException

from distill.__main__ import main
from distill.cli.messages import trainer_message
from tests.program import KD, RKD, TEACHER, TINY, in_a_process


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(capsys, *args, command="fit", tmp_path=None):
    """Return the one-sentence error of a command."""
    code = main([command, *args])
    captured = capsys.readouterr()
    sentences = [line for line in captured.err.splitlines() if line.startswith("distill: ")]
    assert code == 2, captured.err
    assert len(sentences) == 1, captured.err
    assert "Traceback" not in captured.err
    return sentences[0].removeprefix("distill: ")


CASES = {
    "an unknown head": (
        [*TEACHER, "--model.heads.kd.head=KDD"],
        "model.heads.kd.head: there is no class 'KDD': did you mean 'KD', 'SDD' or 'RKD'?",
    ),
    "an unknown head argument": (
        [*TEACHER, *KD, "--model.heads.kd.head.tmperature=2"],
        "model.heads.kd.head: KD has no 'tmperature': did you mean 'temperature'?",
    ),
    "a term's unknown key": (
        [*TEACHER, *KD, "--model.heads.kd.weigth=2"],
        "model.heads.kd: Term has no 'weigth': did you mean 'weight'?",
    ),
    "an unknown layer": (
        ["--model.student.taps=[layr4]"],
        "model.student: no layer 'layr4' in ResNet: did you mean 'layer4'",
    ),
    "a tap that does not return a tensor": (
        ["--model.student=TorchModule", "--model.student.module=tests.nets.Branching", "--model.student.taps=[split]"],
        "model.student: layer 'split' returns tuple, not a tensor: tap a layer inside it",
    ),
    "a wrong choice": (
        [*TEACHER, "--model.heads.rrd.head=RRD", "--model.heads.rrd.head.enqueue=befor"],
        "model.heads.rrd.head.enqueue cannot be 'befor': did you mean 'before'?",
    ),
    "an unknown model": (
        ["--model.student.name=resnet1O"],
        "model.student: timm has no model 'resnet1O': did you mean 'resnet18'",
    ),
    "an unknown network class": (
        ["--model.student=Tim"],
        "model.student: there is no class 'Tim': did you mean 'Timm'?",
    ),
    "an unknown long tail": (
        ["--data.longtail=ExponentialTial"],
        "data.longtail: there is no class 'ExponentialTial': did you mean 'ExponentialTail'?",
    ),
    "an imbalance out of its range": (
        ["--data.longtail=ExponentialTail", "--data.longtail.imbalance=1.5"],
        "data.longtail.imbalance: imbalance must be between 0 and 1, given 1.5",
    ),
    "a class without training images": (
        ["--data.longtail=ExponentialTail", "--data.longtail.imbalance=0.001"],
        "data.longtail: ExponentialTail leaves class 7, of 107 images, without a training image",
    ),
    "an unknown data set": (["--data=Digts"], "data: there is no class 'Digts': did you mean 'Digits'?"),
    "an unknown optimizer": (
        ["--model.optimizer=SDG"],
        "model.optimizer: there is no class 'SDG': did you mean 'SGD'?",
    ),
    "an unknown option": (
        ["--model.studnt=Timm"],
        "there is no option --model.studnt: did you mean '--model.student'",
    ),
    "a value of the wrong type": (["--trainer.max_epochs=abc"], "trainer.max_epochs: expected int, given abc"),
    "a missing configuration file": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "a head that needs tokens of a network without tokens": (
        [
            *TEACHER,
            "--model.heads.rkd.head=RKD",
            "--model.heads.rkd.head.of=tokens",
            "--model.student=TorchModule",
            "--model.student.module=tests.nets.Plain",
        ],
        "model.heads.rkd.head: RKD needs 'tokens' of the student",
    ),
    "a head without a teacher": (KD, "model.heads.kd.head: KD compares with a teacher, but model.teacher is not given"),
    "a negative temperature": (
        [*TEACHER, *KD, "--model.heads.kd.head.temperature=-1"],
        "model.heads.kd.head.temperature: temperature must be above 0, given -1.0",
    ),
    "teacher and student of different class counts": (
        [*TEACHER, *KD, "--model.teacher.num_classes=7"],
        "model.heads.kd.head: KD compares class by class, but the student has 10 classes and the teacher 7",
    ),
    "a missing checkpoint": (["--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no file 'nowhere.ckpt'"),
    "missing weights": (
        ["--model.student.weights=nowhere.pt"],
        "model.student: weights file 'nowhere.pt' does not exist",
    ),
    "a missing data folder": (
        ["--data=ImageFolder", "--data.root=nowhere"],
        "data.root: there is no folder 'nowhere'",
    ),
    "too large a batch": (["--data.batch_size=5000"], "data.batch_size is 5000, more than the 1078 training images"),
    "a reserved term name": (
        [*TEACHER, "--model.heads.task.head=KD"],
        "model.heads: a term cannot be called 'task'",
    ),
    "a batch that is too small for a head": (
        [
            *TEACHER,
            "--model.heads.trg.head=TRG",
            "--model.heads.trg.head.tokens_per_image=1",
            "--model.heads.trg.head.neighbors=16",
        ],
        "model.heads.trg.head: neighbors is 16, but a batch has 16 nodes (1 tokens of each image)",
    ),
    "missing GPUs": (
        ["--trainer.accelerator=gpu", "--trainer.devices=2"],
        "trainer.accelerator: no GPU is available: set trainer.accelerator to cpu or auto",
    ),
    "no devices": (["--trainer.devices=0"], "trainer.devices: expected a number above 0, given 0"),
    "a missing teacher to compile": (
        ["--model.compile=both"],
        "model.compile is 'both', but there is no teacher",
    ),
    "nothing to train on": (["--model.task.weight=0"], "model.task: no term of the loss has a weight"),
}


@pytest.mark.parametrize(("args", "expected"), CASES.values(), ids=CASES)
def test_a_user_error_is_one_sentence_and_leaves_no_files(args, expected, capsys, tmp_path):
    assert expected in refusal(capsys, *TINY, *args)
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("available", "message"),
    [
        ([0], "trainer.devices: GPUs [0, 1] were requested, but only [0] are available"),
        ([], "trainer.accelerator: no GPU is available: set trainer.accelerator to cpu or auto"),
    ],
)
def test_requesting_too_many_gpus_is_one_sentence(available, message):
    assert trainer_message(f"You requested gpu: [0, 1]\n But your machine only has: {available}") == message


def test_lightnings_message_about_too_many_gpus_is_recognized():
    with pytest.raises(MisconfigurationException) as error:
        _sanitize_gpu_ids([98, 99], include_cuda=True)
    assert trainer_message(str(error.value)) is not None


def test_an_error_in_a_file_names_the_same_key(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model:\n  heads:\n    kd: {head: {class_path: KD, init_args: {temperatur: 4}}}\n"
        "    rkd: {head: {class_path: RKD}}\n"
    )
    assert "model.heads.kd.head: KD has no 'temperatur': did you mean 'temperature'?" in refusal(
        capsys, *TINY, "--config=a.yaml"
    )


def test_invalid_yaml_is_reported_with_its_line(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  heads: [\n")
    assert "a.yaml, line 2: this is not valid YAML" in refusal(capsys, *TINY, "--config=a.yaml")


@pytest.mark.parametrize("content", ["text", "truncated", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused(content, capsys, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weights": torch.zeros(1000)}, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "text":
        path.write_text("no checkpoint")
    expected = "is not a checkpoint of distill" if content == "foreign" else "is truncated or not a checkpoint"
    assert expected in refusal(capsys, *TINY, "--ckpt_path=a.ckpt")


def test_an_existing_run_is_not_overwritten(capsys, tmp_path):
    args = [*TINY, "--trainer.default_root_dir=run"]
    assert main(["fit", *args]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "trainer.default_root_dir: 'run' already holds a run" in refusal(capsys, *args)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(capsys, tmp_path):
    args = [
        *TINY,
        *TEACHER,
        *RKD,
        "--trainer.default_root_dir=run",
        "--model.optimizer.lr=1e30",
        "--trainer.limit_train_batches=8",
        "--checkpoint.every_n_train_steps=1",
        "--checkpoint.monitor=null",
    ]
    message = refusal(capsys, *args)
    assert "the loss is not finite at step" in message
    assert "'task'" in message
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values())
    assert saved["global_step"] >= 1


def test_a_checkpoint_of_another_model_is_refused(capsys, tmp_path):
    assert main(["fit", *TINY, "--trainer.default_root_dir=run"]) == 0
    message = refusal(
        capsys, *TINY, "--model.student.name=test_convnext", "--ckpt_path=run/checkpoints/last.ckpt", command="test"
    )
    assert message.startswith(
        "ckpt_path: the checkpoint does not fit this model (they differ in distiller.student.model."
    )


def test_the_program_itself_prints_one_line_and_exits_with_2(tmp_path):
    process = in_a_process("fit", *TINY, *TEACHER, "--model.heads.kd.head=KDD", cwd=tmp_path)
    assert process.returncode == 2
    assert [line for line in process.stderr.splitlines() if "Warning" not in line and not line.startswith("  ")] == [
        "distill: model.heads.kd.head: there is no class 'KDD': did you mean 'KD', 'SDD' or 'RKD'?"
    ]
