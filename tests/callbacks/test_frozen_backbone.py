"""Linear probing: only the student's classifier changes."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from distill.__main__ import main
from distill.callbacks import FrozenBackbone
from distill.cli.program import run
from distill.data import Digits
from distill.export import load_student
from distill.networks import Timm
from distill.training.classification import ClassificationModule
from tests.program import TINY

PROBE = [
    *TINY,
    "--trainer.callbacks=FrozenBackbone",
    "--trainer.max_epochs=2",
    "--model.optimizer.momentum=0.9",
    "--model.student.options={drop_rate: 0.5, drop_path_rate: 0.5}",
    "--model.student.drop_classifier=true",
    "--checkpoint.every_n_train_steps=1",
    "--checkpoint.monitor=null",
    "--checkpoint.save_top_k=-1",
    "--checkpoint.filename={step}",
]


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {
        name.removeprefix("distiller.student.model."): tensor
        for name, tensor in state.items()
        if "student.model" in name
    }


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A checkpoint of a student with trained BatchNorm statistics."""
    folder = tmp_path_factory.mktemp("student")
    run(["fit", *TINY, f"--trainer.default_root_dir={folder}"])
    return folder / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def probed(student, tmp_path_factory):
    """A linear-probing run, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("probe")
    cli = run(["fit", *PROBE, f"--model.student.weights={student}", f"--trainer.default_root_dir={folder}"])
    return cli, folder / "checkpoints"


def assert_only_the_classifier_differs(actual, expected):
    assert actual.keys() == expected.keys()
    assert any(name.endswith("running_var") for name in actual)
    assert {name for name in actual if not torch.equal(actual[name], expected[name])} == {"fc.weight", "fc.bias"}


def test_neither_weights_nor_statistics_of_the_backbone_change(student, probed):
    before = weights(student)
    for step in (1, 2, 3, 4):
        assert_only_the_classifier_differs(before, weights(probed[1] / f"step={step}.ckpt"))


def test_a_resumed_probe_keeps_the_backbone_and_ends_with_the_same_weights(student, probed, tmp_path):
    resumed = [f"--model.student.weights={student}", f"--ckpt_path={probed[1] / 'step=1.ckpt'}"]
    run(["fit", *PROBE, *resumed, f"--trainer.default_root_dir={tmp_path}"])
    actual, expected = weights(tmp_path / "checkpoints/last.ckpt"), weights(probed[1] / "last.ckpt")
    assert_only_the_classifier_differs(weights(student), actual)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_only_the_classifier_is_in_the_optimizer(probed):
    model, optimizer = probed[0].model, probed[0].trainer.optimizers[0]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [id(parameter) for parameter in trained] == [id(p) for p in model.student.model.fc.parameters()]
    assert len(optimizer.state) == 2


def test_the_classifier_is_new(student, probed):
    initial_difference = (weights(probed[1] / "step=1.ckpt")["fc.weight"] - weights(student)["fc.weight"]).norm()
    learned = (weights(probed[1] / "last.ckpt")["fc.weight"] - weights(probed[1] / "step=1.ckpt")["fc.weight"]).norm()
    assert initial_difference > 2 * learned


class Modes(Callback):
    """Records for each step whether any layer of the student is in train mode."""

    def __init__(self):
        self.records = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.records.append(any(layer.training for layer in pl_module.student.modules()))


def test_no_layer_is_in_train_mode_in_any_step(student):
    network = Timm("test_resnet", weights=student, drop_classifier=True, options={"drop_rate": 0.5})
    module = ClassificationModule(network, partial(torch.optim.SGD, lr=0.01), 10, (3, 32, 32)).train()
    modes = Modes()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[FrozenBackbone(), modes],
    )
    trainer.fit(module, Digits(batch_size=16))
    assert modes.records == [False] * 4


def test_a_probe_is_tested_and_exported_like_any_student(probed, student, tmp_path):
    last = probed[1] / "last.ckpt"
    assert main(["test", *TINY, f"--ckpt_path={last}"]) == 0
    assert main(["export", f"--ckpt_path={last}", f"--output={tmp_path / 'probe.safetensors'}"]) == 0
    exported = load_student(last).model.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights(last).items())


def test_a_student_without_a_linear_classifier_is_refused(capsys, tmp_path):
    student = ["--model.student=TorchModule", "--model.student.module=tests.nets.Convolutional"]
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    assert main(["fit", *TINY, *student, "--trainer.callbacks=FrozenBackbone", folder]) == 2
    assert (
        "trainer.callbacks: FrozenBackbone finds no linear classifier in TorchModule(Convolutional)"
        in capsys.readouterr().err
    )
