"""A network's classifier as a function of any embedding."""

from __future__ import annotations

import copy

import pytest
import torch

from distill.features import FeatureSpec, Summary
from distill.networks import FrozenTeacher, Timm

SHAPE = (3, 32, 32)


def built(name: str = "test_resnet", **arguments) -> Timm:
    torch.manual_seed(0)
    network = Timm(name, **arguments)
    network.build(5, SHAPE)
    return network.eval()


def images() -> torch.Tensor:
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnet8_cifar"])
def test_it_computes_the_logits_of_the_embedding_along_any_axes(name):
    network = built(name)
    features = network(images())
    assert network.spec.classifies
    torch.testing.assert_close(features.classify(features.embedding), features.logits)
    torch.testing.assert_close(features.classify(features.embedding.view(2, 2, -1)), features.logits.view(2, 2, -1))
    torch.testing.assert_close(features.classify(features.embedding[0]), features.logits[0])


def test_networks_without_one_or_with_two_have_none():
    assert not built(num_classes=0).spec.classifies
    assert built("deit_tiny_distilled_patch16_224", options={"depth": 1})(images()).classify is None
    assert not FeatureSpec().classifies


def test_a_students_classifier_learns_and_a_teachers_passes_gradients_on():
    student, teacher = built(), FrozenTeacher(built())
    embedding = student(images()).embedding.detach().requires_grad_()
    teacher(images()).classify(embedding).sum().backward()
    assert embedding.grad.any()
    assert teacher.network.model.fc.weight.grad is None
    student(images()).classify(embedding.detach()).sum().backward()
    assert student.model.fc.weight.grad.any()


def test_it_computes_in_the_dtype_of_what_it_is_given():
    teacher = FrozenTeacher(built(), dtype=torch.bfloat16)
    features = teacher(images())
    logits = features.classify(features.embedding.float())
    assert logits.dtype == torch.float32
    model = teacher.network.model
    expected = torch.nn.functional.linear(features.embedding.float(), model.fc.weight.float(), model.fc.bias.float())
    torch.testing.assert_close(logits, expected)


def test_a_call_outside_the_pass_is_not_read():
    network = built()
    features = network(images())
    features.classify(torch.zeros(1, 96))
    assert not network.taps.tensors
    assert torch.equal(network(images()).embedding, features.embedding)


def test_a_copy_and_a_replaced_classifier_count():
    network = built()
    other = copy.deepcopy(network)
    torch.nn.init.zeros_(other.model.fc.weight)
    torch.nn.init.zeros_(other.model.fc.bias)
    embedding = torch.ones(1, 96)
    assert not other(images()).classify(embedding).any()
    assert network(images()).classify(embedding).any()


def test_a_summary_keeps_it():
    features = built()(images())
    assert Summary.of(features, {"embedding"}).classify is features.classify
