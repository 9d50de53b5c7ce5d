"""Taps by stride and by depth name layers that mean the same in every network."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.__main__ import main
from distill.errors import UserError
from distill.heads import AT, FitNet
from distill.networks import Timm, TorchModule
from distill.networks.strides import _place
from tests.program import TINY

SHAPE = (3, 64, 96)
SMALL_SWIN = {"depths": (1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4), "window_size": 4}


def built(name: str, taps, shape=SHAPE, **arguments) -> Timm:
    torch.manual_seed(0)
    network = Timm(name, taps=taps, **arguments)
    network.build(5, shape)
    return network.eval()


def images(shape=SHAPE) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))


SIZES = [(128, 192), (192, 320), (256, 576)]


@settings(deadline=None)
@given(stride=st.sampled_from([1, 2, 4, 8, 16, 32]), width=st.integers(3, 900), last=st.booleans())
def test_the_stride_of_a_map_is_that_at_which_it_grows(stride, width, last):
    seen = []
    for batch, (height, broad) in zip((2, 3, 3), SIZES, strict=True):
        cells = math.ceil(height / stride), math.ceil(broad / stride)
        seen.append(((height, broad), (batch, *cells, width) if last else (batch, width, *cells)))
    place = _place("layer", seen)
    assert place is not None
    assert place.stride == stride
    assert place.grid is None


@settings(deadline=None)
@given(stride=st.sampled_from([4, 8, 14, 16, 32]), prefix=st.sampled_from([0, 1, 2, 5]), width=st.integers(3, 900))
def test_the_grid_of_a_sequence_is_found_after_its_first_tokens(stride, prefix, width):
    sizes = [(stride * rows, stride * columns) for rows, columns in ((8, 12), (12, 20), (16, 36))]
    seen = [
        ((height, broad), (batch, prefix + height // stride * (broad // stride), width))
        for batch, (height, broad) in zip((2, 3, 3), sizes, strict=True)
    ]
    place = _place("layer", seen)
    assert place is not None
    assert (place.stride, place.grid) == (stride, (8, 12))


@pytest.mark.parametrize("seen", [[((64, 64), (2, 8))], [((64, 64), (2, 8, 1, 1)), ((128, 192), (3, 8, 1, 1))]])
def test_vectors_and_pooled_maps_have_no_stride(seen):
    assert _place("layer", seen) is None


FAMILIES = {
    "resnet18": ({}, {"stride2": "act1", "stride4": "layer1", "stride8": "layer2", "stride16": "layer3"}),
    "test_convnext": ({}, {"stride4": "stages.0", "stride8": "stages.1", "stride16": "stages.2"}),
    "test_efficientnet": ({}, {"stride4": "blocks.1", "stride8": "blocks.2", "stride16": "blocks.3"}),
    "swin_tiny_patch4_window7_224": (SMALL_SWIN, {"stride4": "layers.0", "stride8": "layers.1"}),
    "resnet8_cifar": ({}, {"stride1": "stages.0", "stride2": "stages.1", "stride4": "stages.2"}),
    "wrn_16_1_cifar": ({}, {"stride1": "stages.0", "stride2": "stages.1", "stride4": "final"}),
    "test_vit": ({}, {"stride16": "norm", "block25": "blocks.1", "block50": "blocks.2", "block100": "blocks.5"}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_becomes_the_last_layer_of_that_resolution(name):
    options, expected = FAMILIES[name]
    network = built(name, list(expected), options=options)
    assert network.tap_layers == expected
    features = network(images())
    for tap in expected:
        stride = int(tap.removeprefix("stride")) if tap.startswith("stride") else 16
        assert features[tap].shape[2:] == (SHAPE[1] // stride, SHAPE[2] // stride)
        assert network.spec.maps[tap] == features[tap].shape[1:]


def test_a_vits_tokens_are_a_map_without_leading_tokens():
    network = built("vit_small_patch14_reg4_dinov2", ["stride14"], (3, 42, 56), options={"depth": 2})
    features = network(images((3, 42, 56)))
    assert features.grid == (3, 4)
    torch.testing.assert_close(features["stride14"].flatten(2).mT, features.tokens)


def test_equal_names_have_equal_resolution_in_any_pair():
    names = ["stride8", "stride16"]
    student, teacher = built("test_resnet", names), built("swin_tiny_patch4_window7_224", names, options=SMALL_SWIN)
    assert [shape[1:] for shape in student.spec.maps.values()] == [(8, 12), (4, 6)]
    assert [shape[1:] for shape in teacher.spec.maps.values()] == [(8, 12), (4, 6)]
    for head in (AT(names), FitNet("stride16")):
        head.build(student.spec, teacher.spec)
        loss = head(student(images()), teacher(images()), {"image": images()})
        assert loss.isfinite()


def test_names_join_layers_and_the_benchmarks_taps():
    network = built("resnet8_cifar", ["benchmark", "stride4", "stages.0"], (3, 32, 32))
    assert network.tap_layers["stage3"] == network.tap_layers["stride4"] == "stages.2"
    assert network.tap_layers["stages.0"] == "stages.0"
    mapped = built("test_resnet", {"mid": "stride8", "last": "layer4"})
    assert mapped.tap_layers == {"mid": "layer2", "last": "layer4"}


def test_a_module_of_the_users_own_has_strides_too():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))
            self.late = nn.Conv2d(6, 8, 3, 2, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, image):
            return self.head(self.late(self.early(image)).mean((2, 3)))

    network = TorchModule(Net(), taps=["stride4", "stride8"])
    network.build(5, SHAPE)
    assert network.tap_layers == {"stride4": "early", "stride8": "late"}


@pytest.mark.parametrize(
    ("name", "tap", "sentence"),
    [
        (
            "resnet18",
            "stride64",
            "'resnet18' has no 'stride64' for images of 64 x 96: it has stride2, .* stride32",
        ),
        (
            "resnet18",
            "block50",
            "has no 'block50' .*: it has stride2, stride4, .*stride32, and",
        ),
        (
            "test_vit",
            "stride8",
            "has no 'stride8' .*: it has stride16, block25, .*block100, and",
        ),
        ("test_vit", "block101", "has no 'block101'"),
        ("test_vit", "strides8", "no layer 'strides8'"),
    ],
)
def test_what_a_network_lacks_is_named_with_what_it_has(name, tap, sentence):
    with pytest.raises(UserError, match=sentence):
        built(name, [tap])


def test_check_prints_what_each_name_became(capsys):
    taps = ["--model.student.name=test_resnet", "--model.student.taps=[stride8]"]
    assert main(["check", *TINY, *taps]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "tap stride8" in line)
    assert "4 x 4 (layer2)" in line
