"""A teacher in half precision: which tensors are halved, and how far its features move."""

import copy

import pytest
import torch
from torch import nn

from distill.networks import FrozenTeacher, Timm, TorchModule

NAMES = {"test_vit": {"patch_size": 4}, "resnet8x4_cifar": {}, "test_convnext": {}}


def built(name):
    torch.manual_seed(0)
    network = Timm(name, options=NAMES[name])
    network.build(num_classes=10, image_shape=(3, 32, 32))
    return network.eval()


def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def distance(given, expected):
    return float((given.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_halved_and_norms_are_not(name, dtype):
    network = built(name)
    expected = network(images())
    features = FrozenTeacher(network, dtype)(images())
    for layer in network.model.modules():
        own = {tensor.dtype for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert own == {dtype}
        else:
            assert own <= {torch.float32, torch.int64}
    assert distance(features["embedding"], expected["embedding"]) < 0.01


def test_the_tokens_of_a_transformer_are_nearer_than_those_of_one_cast_as_a_whole():
    network = built("test_vit")
    expected = network(images())["tokens"]
    whole = copy.deepcopy(network)
    whole.model.bfloat16()
    features = FrozenTeacher(network, torch.bfloat16)(images())
    assert features["tokens"].dtype == torch.float32
    assert distance(features["tokens"], expected) < 0.8 * distance(whole(images())["tokens"], expected)


class Mixing(nn.Module):
    """Mixes its input with a vector of its own by an operation that takes one dtype."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 10)
        self.other = nn.Parameter(torch.ones(10))

    def forward(self, image):
        return torch.lerp(self.layer(image.mean((2, 3))), self.other.expand(len(image), 10), 0.5)


def test_a_network_that_takes_one_dtype_only_is_cast_as_a_whole():
    network = TorchModule(Mixing())
    network.build(num_classes=10, image_shape=(3, 32, 32))
    teacher = FrozenTeacher(network, torch.bfloat16)
    assert {tensor.dtype for tensor in network.model.parameters()} == {torch.bfloat16}
    assert teacher(images())["logits"].dtype == torch.bfloat16
