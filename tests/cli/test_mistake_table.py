"""Many mistakes of a user, each of which gives exit code 2 and one sentence without a traceback."""

from __future__ import annotations

import re

import pytest

from distill.__main__ import main
from distill.heads import shipped
from tests.program import KD, TEACHER, TINY

M = "--model.heads.m.head"
MINE = """
import torch
from lightning.pytorch import Callback, LightningDataModule
from distill.heads import Head

class Unfinished(Head):
    pass

class Short(Head):
    def forward(self, student, teacher, batch):
        return (student["embedding"] - torch.zeros(3)).mean()

class Vector(Head):
    def forward(self, student, teacher, batch):
        return student["embedding"].mean(1)

class Picky(Head):
    def __init__(self, count: int = 0):
        super().__init__()
        assert count > 3, "count must be above 3"

    def forward(self, student, teacher, batch):
        return student["logits"].sum()

class Careless(Head):
    def build(self, student, teacher):
        student.nothing

    def forward(self, student, teacher, batch):
        return student["logits"].sum()

class Broken(Callback):
    def setup(self, trainer, pl_module, stage):
        {}["missing"]

class Files(LightningDataModule):
    num_classes = 10
    image_shape = (3, 32, 32)

    def setup(self, stage):
        open("nowhere")
"""
MODULES = {
    "mine.py": MINE,
    "unparsable.py": "class Head(:\n    pass\n",
    "unimportable.py": "\nimport module_that_is_not_there\n",
    "wrong_attribute.py": "import torch\n\nx = torch.nothing_of_that_name\n",
}


@pytest.fixture(scope="module", autouse=True)
def _modules_of_a_user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    for name, text in MODULES.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_file(tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    monkeypatch.chdir(tmp_path)


def sentence(capsys, *args, command="fit"):
    """Return the one sentence of a refused command."""
    code = main([command, *args])
    error = capsys.readouterr().err
    sentences = [line.removeprefix("distill: ") for line in error.splitlines() if line.startswith("distill: ")]
    assert code == 2, error
    assert len(sentences) == 1, error
    assert "Traceback" not in error
    assert not re.search(r"Union|Subtypes|<class|NoneType|NestedArg|Parser key|typing\.", sentences[0])
    return sentences[0]


def check(capsys, tmp_path, args, expected, command="fit"):
    assert expected in sentence(capsys, *TINY, *args, command=command)
    assert not (tmp_path / "runs").exists(), "something was written"


LINES = [
    ("a module that does not parse", "unparsable.Head", "unparsable.py, line 1)"),
    ("a module with a missing import", "unimportable.Head", "unimportable.py, line 2)"),
    ("a module with a wrong attribute", "wrong_attribute.Head", "wrong_attribute.py, line 3)"),
    ("an assertion", "mine.Picky", "mine.py, line 20)"),
    ("a failing build", "mine.Careless", "mine.py, line 27)"),
]

# Each row: what is wrong, the options, a part of the sentence.
FAST = [
    ("a negative learning rate", ["--model.optimizer.lr=-0.1"], "model.optimizer.lr: Invalid learning rate: -0.1"),
    (
        "a schedule of no length",
        ["--model.scheduler=CosineAnnealingLR", "--model.scheduler.T_max=0"],
        "model.scheduler.T_max must be at least 1, given 0",
    ),
    ("a mode that does not exist", ["--checkpoint.mode=best"], "checkpoint.mode: `mode` can be min, max but got best"),
    (
        "an unknown monitor",
        ["--checkpoint.monitor=val/top2"],
        "checkpoint.monitor cannot be 'val/top2', which is not logged: did you mean 'val/top5' or 'val/top1'?",
    ),
    ("a strategy's typo", ["--trainer.strategy=dpp"], "trainer.strategy cannot be 'dpp': did you mean 'ddp'?"),
    ("a negative seed", ["--seed_everything=-1"], "seed_everything must be at least 0, given -1"),
    (
        "a folder below a file",
        ["--trainer.default_root_dir=a_file/run"],
        "trainer.default_root_dir: 'a_file/run' cannot be made, since 'a_file' is a file",
    ),
    ("a module that is not there", [*TEACHER, f"{M}=absent.Head"], f"{M[2:]}: there is no module 'absent'"),
    (
        "a module that does not parse",
        [*TEACHER, f"{M}=unparsable.Head"],
        f"{M[2:]}: 'unparsable' cannot be imported: SyntaxError: invalid syntax (",
    ),
    (
        "a module with a missing import",
        [*TEACHER, f"{M}=unimportable.Head"],
        f"{M[2:]}: 'unimportable' cannot be imported: No module named 'module_that_is_not_there' (",
    ),
    (
        "a module with a wrong attribute",
        [*TEACHER, f"{M}=wrong_attribute.Head"],
        "AttributeError: module 'torch' has no attribute 'nothing_of_that_name' (",
    ),
    (
        "an assertion of a user's head",
        [*TEACHER, f"{M}=mine.Picky"],
        f"{M[2:]}.count: AssertionError: count must be above 3 (",
    ),
    ("an unknown term's class", [*TEACHER, "--model.heads.kd=Kd"], "model.heads.kd.head: there is no class 'Kd': did"),
    (
        "a schedule's own sentence",
        [*TEACHER, *KD, "--model.heads.kd.weight={class_path: Warmup, init_args: {steps: 3, epochs: 2}}"],
        "model.heads.kd.weight: Warmup takes steps or epochs, not both (given 3 and 2.0)",
    ),
    ("a wrong precision", ["--trainer.precision=8"], "trainer.precision cannot be '8': known are '16', '16-mixed', "),
    (
        "an unknown option like no other",
        ["--zzz=1"],
        "there is no option --zzz: known are '--checkpoint', '--ckpt_path', '--config', '--data', '--model', ",
    ),
    (
        "NaN",
        [*TEACHER, *KD, "--model.heads.kd.weight=.nan"],
        "model.heads.kd.weight must be a finite number, given NaN",
    ),
    ("no epochs", ["--trainer.max_epochs=0"], "trainer.max_epochs is 0, so there would be nothing to train"),
]

LONG = [
    ("infinity", ["--model.optimizer.lr=.inf"], "model.optimizer.lr must be a finite number, given inf"),
    ("no steps", ["--trainer.max_steps=0"], "trainer.max_steps is 0"),
    ("a negative length", ["--trainer.max_epochs=-5"], "trainer.max_epochs must be at least -1 (-1 means no limit)"),
    ("no accumulation", ["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches must be at least 1"),
    ("a negative clip", ["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val must be at least 0, given -1"),
    ("a share above 1", ["--trainer.limit_train_batches=1.5"], "trainer.limit_train_batches is a share up to 1.0"),
    (
        "a negative interval",
        ["--checkpoint.every_n_train_steps=-1"],
        "checkpoint.every_n_train_steps must be at least 1",
    ),
    ("too few kept", ["--checkpoint.save_top_k=-2"], "checkpoint.save_top_k must be at least -1"),
    ("negative workers", ["--data.num_workers=-1"], "data.num_workers must be at least 0, given -1"),
    ("an empty batch", ["--data.batch_size=0"], "data.batch_size must be at least 1, given 0"),
    ("a fraction of a batch", ["--data.batch_size=1.5"], "data.batch_size: expected int, given 1.5"),
    (
        "a negative momentum",
        ["--model.optimizer.momentum=-1"],
        "model.optimizer.momentum: Invalid momentum value: -1.0",
    ),
    (
        "a learning rate that turns negative",
        ["--model.scheduler=ExponentialLR", "--model.scheduler.gamma=-1"],
        "model.scheduler: ExponentialLR would make the learning rate -0.01 after 1 of its steps",
    ),
    (
        "a schedule shorter than the run",
        [
            "--model.scheduler=OneCycleLR",
            "--model.scheduler.max_lr=0.1",
            "--model.scheduler.total_steps=1",
            "--model.scheduler_interval=step",
        ],
        "model.scheduler: Tried to step 2 times. The specified number of total steps is 1",
    ),
    (
        "an unknown schedule of timm",
        ["--model.scheduler=TimmScheduler", "--model.scheduler.sched=cos"],
        "model.scheduler.sched: Unknown scheduler 'cos'",
    ),
    (
        "a scheduler without monitor",
        ["--model.scheduler=ReduceLROnPlateau"],
        "ReduceLROnPlateau needs 'monitor', which",
    ),
    (
        "a scheduler's unknown monitor",
        ["--model.scheduler=ReduceLROnPlateau", "--model.scheduler.monitor=top1"],
        "model.scheduler.monitor cannot be 'top1', which is not logged: did you mean 'val/top1'?",
    ),
    (
        "a callback's unknown monitor",
        ["--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/los}}"],
        "trainer.callbacks: EarlyStopping.monitor cannot be 'val/los', which is not logged",
    ),
    (
        "a callback's wrong mode",
        ["--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/top1, mode: best}}]"],
        "trainer.callbacks[0].mode: `mode` can be min, max, got best",
    ),
    (
        "a callback's typo",
        ["--trainer.callbacks=[EarlyStoping]"],
        "trainer.callbacks[0]: there is no class 'EarlyStoping'",
    ),
    (
        "an argument beside its class",
        ["--trainer.callbacks={class_path: EarlyStopping, monitor: val/top1}"],
        "trainer.callbacks: 'monitor' stands beside class_path: write the arguments of a class under init_args",
    ),
    (
        "a user's callback",
        ["--trainer.callbacks=mine.Broken"],
        "trainer.callbacks: Broken: KeyError: 'missing' (",
    ),
    ("a user's data", ["--data=mine.Files"], "data: no such file or directory: 'nowhere' ("),
    ("a logger's typo", ["--trainer.logger=CSVLoger"], "trainer.logger: there is no class 'CSVLoger': did you mean"),
    ("a logger that is not installed", ["--trainer.logger=CometLogger"], "trainer.logger: Requirement 'comet-ml"),
    (
        "an unknown accelerator",
        ["--trainer.accelerator=gup"],
        "trainer.accelerator cannot be 'gup': known are 'auto', ",
    ),
    ("a wrong precision's name", ["--trainer.precision=fp17"], "trainer.precision cannot be 'fp17': known are"),
    ("a wrong flag", ["--trainer.deterministic=maybe"], "cannot be 'maybe': known are 'false', 'true' and 'warn'"),
    ("a wrong duration", ["--trainer.max_time=soon"], "trainer.max_time: `Timer(duration='soon')` is not a valid dur"),
    (
        "devices that are no number",
        ["--trainer.devices=some"],
        "trainer.devices: expected a number above 0, given some",
    ),
    ("a trainer that is a number", ["--trainer=5"], "trainer: expected its keys, or a file with them, given '5'"),
    ("an option without value", ["--trainer.max_epochs"], "trainer.max_epochs: its value is missing: write"),
    ("a word without option", ["fast"], "'fast' belongs to no option: write options as --KEY=VALUE"),
    (
        "what is taken from the data",
        ["--model.num_classes=7"],
        "model.num_classes is 7, but Digits has 10: leave it out",
    ),
    ("no term", [*TEACHER, "--model.heads.m.weight=3"], "model.heads.m: Term needs 'head', which is not given"),
    ("a term of nothing", [*TEACHER, "--model.heads.m.weight=null", f"{M}=KD"], "model.heads.m.weight is null: give a"),
    ("a term without name", [*TEACHER, "--model.heads..head=KD"], "model.heads: a term cannot be called ''"),
    ("a head's class as the term's", [*TEACHER, "--model.heads.m.class_path=KD"], "write the class under 'head'"),
    ("heads that are a list", [*TEACHER, "--model.heads=[KD]"], "model.heads: expected a mapping, given [KD]"),
    ("a head that is a number", [*TEACHER, f"{M}=5"], f"{M[2:]}: expected a Head, given 5"),
    ("a head that is abstract", [*TEACHER, f"{M}=RelationHead"], "RelationHead is an abstract class: name one of its"),
    (
        "a user's abstract head",
        [*TEACHER, f"{M}=mine.Unfinished"],
        "mine.Unfinished is abstract: it does not define for",
    ),
    ("a head that is none", [*TEACHER, f"{M}=torch.nn.Linear"], f"{M[2:]}: torch.nn.Linear is not a Head"),
    (
        "a name in a module",
        [*TEACHER, f"{M}=mine.Shrt"],
        f"{M[2:]}: module 'mine' has no 'Shrt': did you mean 'Short'?",
    ),
    ("a head's failing build", [*TEACHER, f"{M}=mine.Careless"], "no attribute 'nothing' ("),
    ("a nested typo", [*TEACHER, f"{M}=KD", f"{M}.temprature=3"], f"{M[2:]}: KD has no 'temprature': did you mean"),
    (
        "a nested number",
        [*TEACHER, f"{M}=KD", f"{M}.temperature=hot"],
        f"{M[2:]}.temperature: expected float or a Sched",
    ),
    ("a class misspelled", [*TEACHER, f"{M}={{class_pth: KD}}"], f"{M[2:]}: 'class_pth' is not known: did you mean"),
    (
        "arguments first",
        ["--model.teacher.name=test_resnet"],
        "model.teacher: its class is not given: add class_path, or",
    ),
    ("a wrong tap", ["--model.student.taps={a: 5}"], "model.student.taps.a: expected text, given 5"),
    (
        "a size that is none",
        ["--model.student.image_size=big"],
        "model.student.image_size: expected int or a list of 2",
    ),
    ("an argument of data", ["--data.mixing={mixp: 1}"], "data.mixing: Mixing has no 'mixp': did you mean 'mixup'"),
    ("an optimizer that is none", ["--model.optimizer=torch.nn.Linear"], "torch.nn.Linear is not an Optimizer"),
]


@pytest.mark.parametrize(("args", "expected"), [row[1:] for row in FAST], ids=[row[0] for row in FAST])
def test_a_mistake_is_one_sentence_with_its_key(args, expected, capsys, tmp_path):
    check(capsys, tmp_path, args, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("args", "expected"), [row[1:] for row in LONG], ids=[row[0] for row in LONG])
def test_a_further_mistake_is_one_sentence_with_its_key(args, expected, capsys, tmp_path):
    check(capsys, tmp_path, args, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "expected"), [row[1:] for row in LINES], ids=[row[0] for row in LINES])
def test_an_error_in_a_users_module_ends_with_its_file_and_line(head, expected, capsys):
    assert sentence(capsys, *TINY, *TEACHER, f"{M}={head}").endswith(expected)


@pytest.mark.slow
def test_tensorboard_that_is_not_installed_is_one_sentence(capsys, tmp_path):
    import importlib.util

    if any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        pytest.skip("TensorBoard is installed")
    args = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]
    check(capsys, tmp_path, args, "trainer.logger: Neither `tensorboard` nor `tensorboardX` is available")


CHECKED = [
    ("too large a batch", ["--data.batch_size=5000"], "data.batch_size is 5000, more than the 1078 training images"),
    (
        "samples of CRD",
        [*TEACHER, f"{M}=CRD", f"{M}.samples=2000"],
        f"{M[2:]}: CRD has samples 2000, but the training set has 1078",
    ),
    ("a head of a wrong shape", [*TEACHER, f"{M}=mine.Short"], f"{M[2:]}: The size of tensor a (96) must match"),
    (
        "segments without the callback",
        [*TEACHER, f"{M}=tests.cli.segments.Segmented"],
        f"{M[2:]}: Segmented needs segments: add the callback SuperpixelSegments to trainer.callbacks",
    ),
]
CHECKED_TOO = [
    ("an unknown monitor", ["--checkpoint.monitor=top1"], "checkpoint.monitor cannot be 'top1', which is not logged"),
    ("a head's line", [*TEACHER, f"{M}=mine.Short"], "mine.py, line 11)"),
    ("a head without scalar", [*TEACHER, f"{M}=mine.Vector"], f"{M[2:]}: Vector must return a scalar, but returned a"),
    ("a folder below a file", ["--trainer.default_root_dir=a_file"], "trainer.default_root_dir: 'a_file' is a file"),
    ("a negative learning rate", ["--model.optimizer.lr=-1"], "model.optimizer.lr: Invalid learning rate: -1.0"),
]


@pytest.mark.parametrize(("args", "expected"), [row[1:] for row in CHECKED], ids=[row[0] for row in CHECKED])
def test_check_refuses_what_fit_would_refuse_and_tries_the_heads(args, expected, capsys, tmp_path):
    check(capsys, tmp_path, args, expected, command="check")


@pytest.mark.slow
@pytest.mark.parametrize(("args", "expected"), [row[1:] for row in CHECKED_TOO], ids=[row[0] for row in CHECKED_TOO])
def test_check_refuses_more_of_what_fit_would_refuse(args, expected, capsys, tmp_path):
    check(capsys, tmp_path, args, expected, command="check")


def test_check_refuses_the_folder_of_another_run_as_fit_does(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step\n")
    sentences = [sentence(capsys, *TINY, "--trainer.default_root_dir=run", command=name) for name in ("check", "fit")]
    assert sentences[0] == sentences[1]
    assert "'run' already holds a run" in sentences[0]


@pytest.mark.slow
@pytest.mark.parametrize("head", sorted(shipped()))
def test_check_can_try_every_head(head, capsys):
    args = ["--model.student.image_size=128", "--model.teacher=Timm", "--model.teacher.name=test_resnet"]
    args += ["--model.teacher.image_size=128", "--trainer.callbacks=SuperpixelSegments", f"{M}={head}"]
    args += [f"{M}.samples=1078"] if head == "CRD" else []
    args += ["--data.train_views=[weak,strong]"] if "view" in shipped()[head].batch_needs else []
    code = main(["check", *TINY, *args])
    assert code == 0, capsys.readouterr().err


def test_check_points_at_a_negative_weight(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", *TINY, "--model.task.weight=-1"]) == 0
    assert "-1 (negative: this term is maximized)" in capsys.readouterr().out


@pytest.mark.slow
def test_every_misspelled_key_of_a_configuration_is_named(capsys, tmp_path):
    text = (
        "data: {class_path: Digits, init_args: {batch_size: 16}}\n"
        "model:\n"
        "  student: {class_path: Timm, init_args: {name: test_resnet}}\n"
        "  teacher: {class_path: Timm, init_args: {name: test_efficientnet}}\n"
        "  optimizer: {class_path: AdamW, init_args: {lr: 0.001, weight_decay: 0.25}}\n"
        "  heads:\n"
        "    kd: {head: {class_path: KD, init_args: {temperature: 3.0}}, weight: 0.9}\n"
        "    rkd: {head: RKD, weight: {class_path: Warmup, init_args: {value: 2.0, steps: 10}}}\n"
        "trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 2}\n"
        "checkpoint: {monitor: val/top1}\n"
    )
    for found in re.finditer(r"\w+(?=:)", text):
        if found[0] in ("kd", "rkd"):  # names of the user's choice
            continue
        wrong = f"{found[0]}x"
        (tmp_path / "a.yaml").write_text(text[: found.start()] + wrong + text[found.end() :])
        assert wrong in sentence(capsys, "--config=a.yaml")
