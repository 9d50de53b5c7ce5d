"""The smallest network of every family takes a step as a teacher without classifier and as a student."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from distill.distiller import Distiller
from distill.heads import RKD, CrossEntropy, FitNet
from distill.networks import FrozenTeacher, Network, Timm, Torchvision
from distill.objective import Objective, Term
from distill.schedules import Progress
from tests.networks.test_families import OWN_SIZE, QUICK, SLOW

MORE = (
    "csatv2",
    "deepseek_vit_412m",
    "gemma4_vit_167m",
    "inception_resnet_v2",
    "inception_v4",
    "legacy_xception",
    "mobilenetv5_300m",
    "nasnetalarge",
    "pnasnet5large",
    "qwen3_vit_88m",
    "sam2_hiera_tiny",
)
"""Modules of timm that `test_families` leaves out, since they are large or slow."""

FAILING: dict[str, str] = {}
"""Networks of timm that cannot take part, with the reason."""

TORCHVISION = {
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 107,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vit_b_32": 64,
    "wide_resnet50_2": 64,
}
"""The smallest classification model of each of torchvision's families, and a size of images that it takes."""

SIZES = {**OWN_SIZE, "deepseek_vit_412m": 112}
"""Sizes of images for networks of timm that do not take 128 x 128."""

CLASSES = 7
pytestmark = pytest.mark.slow


def test_every_module_of_timm_and_every_family_of_torchvision_is_here():
    from torchvision import models

    names = [*QUICK, *SLOW, *MORE, *FAILING]
    assert set(timm.list_modules()) <= {_model_to_module.get(name) for name in names}
    families = {name.rstrip("0123456789").split("_")[0].rstrip("0123456789") for name in TORCHVISION}
    known = models.list_models(module=models)
    assert {name for name in known if not any(name.startswith(family) for family in families)} == set()


def take_a_step(student: Network, teacher: Network) -> None:
    """Train once with labels and with relations of embeddings and tokens."""
    terms = {
        "task": Term(CrossEntropy()),
        "embedding": Term(RKD()),
        "tokens": Term(FitNet("tokens")),
    }
    if student.spec.tokens is None or teacher.spec.tokens is None:
        del terms["tokens"]
    frozen = FrozenTeacher(teacher)
    before = {name: tensor.clone() for name, tensor in student.model.named_parameters()}
    distiller = Distiller(student, frozen, Objective(terms, student.spec, frozen.spec)).train()
    image = torch.rand(2, *student.image_shape, generator=torch.Generator().manual_seed(0))
    losses = distiller({"image": image, "label": torch.tensor([1, 2]), "index": torch.arange(2)}, Progress(0))
    losses.total.backward()
    torch.optim.SGD(distiller.parameters(), lr=1e-3).step()
    assert losses.total.isfinite()
    gradients = [parameter.grad for parameter in student.model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.model.named_parameters())


def small(side: int, learns: bool) -> Timm:
    network = Timm("test_resnet", num_classes=None if learns else 0)
    network.build(CLASSES, (3, side, side), learns)
    return network


def check(make, side: int) -> None:
    torch.manual_seed(0)
    teacher = make(num_classes=0)
    teacher.build(CLASSES, (3, side, side), learns=False)
    assert teacher.spec.logits is None
    assert not teacher.spec.classifies
    assert teacher.spec.embedding is not None
    take_a_step(small(side, learns=True), teacher)
    student = make()
    student.build(CLASSES, (3, side, side))
    assert student.spec.logits == (CLASSES,)
    assert student.spec.embedding == teacher.spec.embedding
    assert student.spec.tokens == teacher.spec.tokens
    del teacher
    take_a_step(student, small(side, learns=False))


@pytest.mark.parametrize("name", [*QUICK, *SLOW, *MORE])
def test_a_network_of_timm_teaches_without_classifier_and_learns(name):
    check(lambda **arguments: Timm(name, image_size=SIZES.get(name), **arguments), 128)


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_network_of_torchvision_teaches_without_classifier_and_learns(name):
    check(lambda **arguments: Torchvision(name, **arguments), TORCHVISION[name])
