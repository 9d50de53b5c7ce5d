"""Any module as a network."""

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.networks import TorchModule

SHAPE = (3, 8, 12)


class Convolutional(nn.Module):
    """A net whose classifier is not its last attribute, and whose last map is written over in place."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, num_classes)
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)

    def forward(self, image):
        return self.classifier(self.relu(self.stem(image)).mean((2, 3)))


class Patches(nn.Module):
    """A net of 4 x 4 patches with a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, image):
        patches = self.embed(image).flatten(2).transpose(1, 2)
        mixed = self.mix(torch.cat([self.token.expand(len(image), -1, -1), patches], 1))
        return self.head(mixed[:, 0])


def built(module: nn.Module, num_classes: int = 5, **arguments) -> TorchModule:
    network = TorchModule(module, **arguments)
    network.build(num_classes, SHAPE)
    return network.eval()


def images() -> torch.Tensor:
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frozen", [["stem"], []], ids=["a frozen layer", "the whole module in eval mode"])
def test_layers_that_were_frozen_in_eval_mode_stay_so_and_a_whole_module_is_trained(frozen):
    module = Convolutional()
    for layer in [module.get_submodule(name) for name in frozen] or [module]:
        layer.eval()
    network = TorchModule(module)
    network.build(5, SHAPE)
    assert [name for name, layer in network.model.named_modules() if not layer.training] == frozen


def test_the_embedding_is_what_the_last_linear_layer_that_runs_reads():
    network = built(Convolutional())
    features = network(images())
    assert torch.equal(network.model.classifier(features.embedding), features.logits)
    assert network.spec.embedding == (6,)
    assert network.spec.tokens is None
    assert network.name == "TorchModule(Convolutional)"
    assert list(network.classifier) == ["classifier"]


def test_a_map_gives_tokens_row_by_row_as_its_layer_returned_them():
    network = built(Convolutional(), tokens="stem")
    features = network(images())
    cells = network.model.stem(images())
    assert features.grid == (4, 6)
    assert torch.equal(features.tokens[:, 7], cells[:, :, 1, 1])
    assert features.tokens.min() < 0


def test_the_embedding_can_be_the_mean_of_a_map():
    network = built(Convolutional(), embedding="stem")
    assert torch.allclose(network(images()).embedding, network.model.stem(images()).mean((2, 3)), atol=1e-6)


def test_patch_tokens_come_without_their_prefix():
    network = built(Patches(), tokens="mix", prefix_tokens=1)
    features = network(images())
    assert features.grid == (2, 3)
    cells = network.model.embed(images())
    assert torch.allclose(features.tokens[:, 4], network.model.mix(cells[:, :, 1, 1]), atol=1e-6)


def test_a_network_without_a_linear_layer_has_no_embedding():
    network = built(nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert network.spec.embedding is None
    assert network.spec.logits == (5,)
    assert not network.classifier


def test_images_come_as_they_are_unless_told_otherwise():
    network = built(Convolutional())
    assert torch.equal(network.prepare(images()), images())
    network = built(Convolutional(), mean=[0.5], std=[0.25], image_size=(4, 6))
    assert network.prepare(images()).shape == (2, 3, 4, 6)


class Pair(Convolutional):
    def forward(self, image):
        return super().forward(image), None


class ReadsTokens(Patches):
    def forward(self, image):
        return self.head(self.embed(image).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (Convolutional(7), {}, r"TorchModule\(Convolutional\) returns 7 logits, but the data have 5 classes"),
        (Pair(), {}, "must return logits .*, but returns tuple"),
        (nn.Conv2d(3, 5, 1), {}, r"must return logits .*, but returns a tensor of shape \(2, 5, 8, 12\)"),
        (Patches(), {"tokens": "mix"}, "the 7 tokens of 'mix' do not form a grid over 8 x 12 pixels: is prefix_tokens"),
        (Patches(), {"tokens": "head"}, r"layer 'head' gives \(2, 5\)"),
        (ReadsTokens(), {}, r"embedding of .* given \(2, 6, 6\): choose another layer"),
        (Convolutional(), {"tokens": "stm"}, "no layer 'stm' in Convolutional: did you mean 'stem'"),
        (Convolutional(), {"taps": ["unused"]}, "'unused' takes no part"),
        (Convolutional(), {"prefix_tokens": -1}, "prefix_tokens must be at least 0, given -1"),
    ],
)
def test_a_mistake_is_one_sentence(module, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        built(module, **arguments)
    assert "\n" not in str(caught.value)


def test_weights_are_loaded_without_the_classifier_if_told_so(tmp_path):
    other = Convolutional(7)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="has 7 classes, but the network has 5"):
        built(Convolutional(), weights=tmp_path / "other.pt")
    module = Convolutional()
    kept = module.classifier.weight.clone()
    built(module, weights=tmp_path / "other.pt", drop_classifier=True)
    assert torch.equal(module.stem.weight, other.stem.weight)
    assert torch.equal(module.classifier.weight, kept)
