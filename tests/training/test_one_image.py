"""Batches of one image train wherever the mathematics allows, and are refused in one sentence elsewhere."""

import pytest
import torch

from distill.__main__ import main
from distill.errors import UserError
from distill.heads import RKD, RunInfo, shipped
from distill.networks import Timm
from distill.training.checks import require_batch_statistics
from tests.program import TINY

ONE = [word for word in TINY if "batch_size" not in word] + ["--data.batch_size=1"]
VIT = ["--model.student.name=test_vit", "--model.teacher=Timm", "--model.teacher.name=test_vit"]
OF_IMAGES = ["CC", "DCD", "IRG", "PKT", "RKD", "RepDistillerCC", "SP"]


def fit(tmp_path, *args):
    return main(["fit", *ONE, f"--trainer.default_root_dir={tmp_path / 'run'}", *args])


@pytest.mark.parametrize(
    "student",
    [["--data.image_size=64"], pytest.param([*VIT, "--model.heads.kd.head=KD"], marks=pytest.mark.slow)],
    ids=["CNN", "ViT"],
)
def test_batches_of_one_image_train(student, tmp_path):
    assert fit(tmp_path, *student) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_a_single_value_per_channel_has_no_batch_statistics(tmp_path, capsys):
    assert fit(tmp_path) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill: ")]
    assert message[0].startswith(
        "distill: data.batch_size: with a batch of 1 image, the BatchNorm 'layer4.0.bn1' of test_resnet gets a single "
        "value per channel, which has no variance: give 2 or more"
    )
    assert not (tmp_path / "run").exists()


def built(side):
    student = Timm("test_resnet")
    student.build(10, (3, side, side))
    return student


def test_the_check_agrees_with_torch_and_leaves_the_student_as_it_is():
    for side in (32, 64):
        student = built(side).train()
        student.model.layer1.eval()
        modes = {name: layer.training for name, layer in student.named_modules()}
        before = {name: value.clone() for name, value in student.state_dict().items()}
        try:
            require_batch_statistics(student, RunInfo(batch_size=1))
            is_refused = False
        except UserError:
            is_refused = True
        assert modes == {name: layer.training for name, layer in student.named_modules()}
        assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
        fails = False
        try:
            student.train()(torch.rand(1, 3, side, side))
        except ValueError:
            fails = True
        assert is_refused == fails == (side == 32)


def test_frozen_layers_and_larger_batches_are_not_refused():
    require_batch_statistics(built(32), RunInfo(batch_size=2))
    require_batch_statistics(built(32).eval(), RunInfo(batch_size=1))
    require_batch_statistics(built(32).requires_grad_(False), RunInfo(batch_size=1))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_relations_among_the_images_of_a_batch_are_refused(name):
    head = shipped()[name]()
    runs = [RunInfo(batch_size=1), RunInfo(batch_size=1, world_size=2), RunInfo(batch_size=2)]
    with pytest.raises(UserError, match=f"{name} relates the images of a batch, but data.batch_size is 1"):
        head.prepare(runs[0])
    for run in runs[1:]:
        head.prepare(run)


def test_the_tokens_of_one_image_can_be_related():
    RKD(of="tokens", scope="image").prepare(RunInfo(batch_size=1))
    with pytest.raises(UserError):
        RKD(scope="batch").prepare(RunInfo(batch_size=1, world_size=2))
