"""Networks without classifier, and teachers whose classifier is never random."""

from __future__ import annotations

import pytest
import timm
import torch

from distill.errors import UserError
from distill.networks import Timm
from distill.networks.timm import _has_projection

SHAPE = (3, 64, 96)
FOUNDATION = {  # name -> options, size, grid
    "vit_small_patch14_dinov2": ({"depth": 2}, (56, 84), (4, 6)),
    "vit_small_patch14_reg4_dinov2": ({"depth": 2}, (84, 56), (6, 4)),
    "vit_small_patch16_dinov3": ({"depth": 2}, (64, 96), (4, 6)),
    "vit_base_patch16_siglip_224": ({"depth": 2}, (64, 96), (4, 6)),
    "vit_base_patch16_clip_224": ({"depth": 2}, (64, 64), (4, 4)),
    "vit_base_patch16_224.mae": ({"depth": 2}, (96, 64), (6, 4)),
    "eva02_tiny_patch14_224": ({"depth": 2}, (56, 84), (4, 6)),
}


@pytest.mark.parametrize("name", FOUNDATION)
def test_a_backbone_gives_its_tokens_and_embedding_and_no_logits(name):
    options, size, grid = FOUNDATION[name]
    network = Timm(name, num_classes=0, options=options)
    network.build(5, (3, *size), learns=False)
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        features = network.eval()(image)
        prepared = network.prepare(image)
        model = network.model
        torch.testing.assert_close(features.embedding, model(prepared))
        last = model.forward_intermediates(prepared, indices=1, norm=True, intermediates_only=True)[-1]
    assert features.logits is None
    assert features.grid == network.spec.grid == grid
    torch.testing.assert_close(features.tokens, last.flatten(2).mT)
    with pytest.raises(UserError, match="gives no 'logits'"):
        network.spec["logits"]


def pretrained(tmp_path, classes, name="test_resnet", **arguments):
    """A network whose weights are those of a file, as if they were downloaded."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt"), "num_classes": classes}
    return Timm(name, pretrained=True, options={"pretrained_cfg_overlay": overlay}, **arguments), model.eval()


def test_a_pretrained_teacher_keeps_its_own_classifier_for_whichever_classes(tmp_path):
    teacher, model = pretrained(tmp_path, 9)
    teacher.build(5, SHAPE, learns=False)
    image = torch.rand(2, *SHAPE)
    assert teacher.spec.logits == (9,)
    torch.testing.assert_close(teacher.eval()(image).logits, model(teacher.prepare(image)))


def test_a_pretrained_student_gets_a_classifier_for_the_data(tmp_path):
    student, _ = pretrained(tmp_path, 9)
    student.build(5, SHAPE)
    assert student.spec.logits == (5,)


def test_a_teacher_that_was_trained_without_classifier_gives_no_logits(tmp_path):
    for learns, logits in ((False, None), (True, (5,))):
        network, _ = pretrained(tmp_path, 0, "test_vit")
        network.build(5, SHAPE, learns)
        assert network.spec.logits == logits


def test_a_teacher_of_a_file_without_its_classifier_gives_no_logits(tmp_path):
    _, model = pretrained(tmp_path, 9)
    for arguments in ({"drop_classifier": True}, {"num_classes": 0}):
        network = Timm("test_resnet", weights=tmp_path / "weights.pt", **arguments)
        network.build(5, SHAPE, learns=False)
        assert network.spec.logits is None
        assert torch.equal(network.model.conv1[0].weight, model.conv1[0].weight)


@pytest.mark.parametrize("arguments", [{"num_classes": 5}])
def test_a_random_classifier_of_a_teacher_is_refused(arguments, tmp_path):
    teacher, _ = pretrained(tmp_path, 9, **arguments)
    with pytest.raises(UserError, match="num_classes: a teacher's classifier of 5 classes would be random, as its own"):
        teacher.build(5, SHAPE, learns=False)
    dropped = Timm("test_resnet", weights=tmp_path / "weights.pt", drop_classifier=True, **arguments)
    with pytest.raises(UserError, match="would be random, as drop_classifier leaves it out"):
        dropped.build(5, SHAPE, learns=False)


def test_projections_to_texts_are_no_classifiers():
    configs = {name: timm.get_pretrained_cfg(name).num_classes for name in timm.list_pretrained()}
    projections = {name for name in configs if _has_projection(name)}
    assert "vit_base_patch16_clip_224.openai" in projections
    assert "vit_base_patch16_clip_224.openai_ft_in1k" not in projections
    assert "resnet18.a1_in1k" not in projections
    assert not any("in1k" in name or "in12k" in name or "in22k" in name for name in projections)


def test_a_headless_student_trains_and_is_exported():
    network = Timm("test_resnet", num_classes=0)
    network.build(5, SHAPE)
    features = network(torch.rand(2, *SHAPE))
    features.embedding.square().mean().backward()
    assert network.model.conv1[0].weight.grad.any()
    code = network.loading_code("student.safetensors")
    assert "num_classes=0" in code
    assert "embedding = network" in code
