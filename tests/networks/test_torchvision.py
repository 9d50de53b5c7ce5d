"""Networks of torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.networks import Torchvision

SHAPE = (3, 64, 96)


def built(name="resnet18", classes=5, shape=SHAPE, learns=True, **arguments) -> Torchvision:
    torch.manual_seed(0)
    network = Torchvision(name, **arguments)
    network.build(classes, shape, learns)
    return network.eval()


def images(shape=SHAPE) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "grid", "width"),
    [
        ("resnet18", (2, 3), 512),
        ("squeezenet1_1", (3, 5), 512),
        pytest.param("mobilenet_v3_small", (2, 3), 576, marks=pytest.mark.slow),
        pytest.param("swin_t", (2, 3), 768, marks=pytest.mark.slow),
    ],
)
def test_embedding_tokens_and_logits_are_the_models(name, grid, width):
    network = built(name)
    features = network(images())
    torch.testing.assert_close(features.logits, network.model(network.prepare(images())))
    assert features.grid == grid
    assert features.tokens.shape == (2, grid[0] * grid[1], width)
    if name in ("resnet18", "swin_t"):
        torch.testing.assert_close(features.embedding, features.tokens.mean(1))
        torch.testing.assert_close(features.classify(features.embedding), features.logits)


@pytest.mark.slow
def test_a_vit_is_made_for_the_size_of_the_data_and_gives_its_patches():
    network = built("vit_b_32", shape=(3, 64, 64), taps=["stride32", "block50"])
    features = network(images((3, 64, 64)))
    assert network.size_options == {"image_size": 64}
    assert features.grid == (2, 2)
    assert features["block50"].shape == (2, 768, 2, 2)
    assert network.tap_layers["block50"] == "encoder.layers.encoder_layer_5"
    torch.testing.assert_close(features["stride32"].flatten(2).mT, features.tokens)
    assert "image_size=64" in network.loading_code("a.safetensors")


def test_without_classes_the_output_is_the_embedding():
    network = built(num_classes=0)
    features = network(images())
    assert features.logits is None
    torch.testing.assert_close(features.embedding, network.model(network.prepare(images())))
    assert "network.set_submodule('fc', torch.nn.Identity())" in network.loading_code("a.safetensors")


def test_the_lines_that_load_an_exported_network_work(tmp_path):
    from safetensors.torch import save_file

    for arguments in ({}, {"num_classes": 0}):
        network = built(**arguments)
        path = tmp_path / f"{len(arguments)}.safetensors"
        save_file(network.model.state_dict(), path)
        code = {"image": images()}
        exec(network.loading_code(str(path)), code)
        features = network(images())
        name = "embedding" if arguments else "logits"
        torch.testing.assert_close(code[name], features[name], rtol=1e-4, atol=1e-5)


def test_pretrained_weights_bring_their_normalization_and_their_classifier(tmp_path, monkeypatch):
    from torchvision.models import get_model, get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = get_model_weights("resnet18").DEFAULT
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    model = get_model("resnet18").eval()
    torch.save(model.state_dict(), folder / weights.url.rsplit("/", 1)[1])
    teacher = built(pretrained=True, learns=False)
    assert teacher.spec.logits == (1000,)
    assert teacher.mean.flatten().tolist() == pytest.approx(weights.transforms().mean)
    torch.testing.assert_close(teacher(images()).logits, model(teacher.prepare(images())))
    student = built(pretrained="IMAGENET1K_V1")
    assert student.spec.logits == (5,)
    assert torch.equal(student.model.conv1.weight, model.conv1.weight)
    with pytest.raises(UserError, match="a teacher's classifier of 5 classes would be random, as its own has 1000"):
        built(pretrained=True, learns=False, num_classes=5)


def test_gray_images_are_repeated_and_a_file_of_weights_is_loaded(tmp_path):
    torch.save(built(classes=9).model.state_dict(), tmp_path / "a.pt")
    network = built(shape=(1, 64, 64), weights=tmp_path / "a.pt", drop_classifier=True, learns=False)
    assert network.spec.logits is None
    assert network(images((1, 64, 64))).embedding.shape == (2, 512)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "resnet81"}, "torchvision has no classification model 'resnet81': did you mean 'resnet18'"),
        ({"pretrained": "IMAGENET1K_V9"}, "has no weights 'IMAGENET1K_V9': did you mean 'IMAGENET1K_V1'"),
        ({"options": {"droput": 0.1}}, "options .* do not fit torchvision's 'resnet18'.*droput"),
        ({"options": {"num_classes": 3}}, "options: 'num_classes' cannot be given there"),
        ({"shape": (4, 64, 64)}, "takes images of 3 channels, the data have 4"),
        ({"name": "vit_b_32", "shape": (3, 40, 40)}, "'vit_b_32' does not take images of 40 x 40 .*: set image_size"),
        ({"pretrained": True, "weights": "a.pt"}, "pretrained and weights .* exclude each other"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        built(**arguments)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded_ask_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="pretrained: torchvision's weights of 'resnet18' cannot be downloaded"):
        built(pretrained=True)


def test_additional_classifiers_are_left_out_unless_asked_for():
    network = built("googlenet")
    assert not any(isinstance(layer, nn.Linear) and name != "fc" for name, layer in network.model.named_modules())
