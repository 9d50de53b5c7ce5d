"""Networks of timm: what is not the same for every family."""

import copy

import pytest
import timm
import torch
from torch.nn.functional import interpolate

from distill.errors import UserError
from distill.networks import Timm

SHAPE = (3, 64, 96)


def built(name: str = "test_resnet", num_classes: int = 5, shape: tuple[int, int, int] = SHAPE, **arguments) -> Timm:
    network = Timm(name, **arguments)
    network.build(num_classes, shape)
    return network


def images(shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))


def test_the_spec_is_known_after_build():
    network = built("test_vit", taps=["blocks.0"])
    assert network.spec.logits == (5,)
    assert network.spec.embedding == (64,)
    assert network.spec.tokens == (24, 64)
    assert network.spec.grid == (4, 6)
    assert network.spec.maps == {"blocks.0": (25, 64)}
    assert network.name == "test_vit"


def test_build_leaves_the_mode_and_the_random_state_of_creation():
    torch.manual_seed(3)
    timm.create_model("test_resnet", num_classes=5)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert built().training
    assert torch.equal(torch.rand(1), expected)


def test_a_model_for_one_size_is_made_for_the_size_of_the_data():
    torch.manual_seed(3)
    bare = timm.create_model("test_maxvit", num_classes=5, img_size=(64, 96))
    expected = torch.rand(1)
    torch.manual_seed(3)
    network = built("test_maxvit")
    assert torch.equal(torch.rand(1), expected)  # the attempt without img_size has left no trace
    for key, tensor in bare.state_dict().items():
        assert torch.equal(tensor, network.model.state_dict()[key])


def test_a_size_that_does_not_fit_is_named_with_the_models_own():
    with pytest.raises(
        UserError, match=r"'efficientformer_l1' does not take images of 64 x 64 .*: set image_size.* 224"
    ):
        built("efficientformer_l1", shape=(3, 64, 64))


def test_images_are_resized_and_normalized_as_the_model_wants_them():
    network = built("test_vit", image_size=48).eval()
    config = network.model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    resized = interpolate(images(), (48, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.allclose(network(images()).logits, network.model((resized - mean) / std), atol=1e-6)
    assert network.spec.grid == (3, 3)


def test_own_mean_and_std_are_used():
    network = built(mean=[0.1, 0.2, 0.3], std=[2.0])
    expected = (images() - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 2
    assert torch.allclose(network.prepare(images()), expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mean": [0.1, 0.2]}, "mean has 2 values, but the images have 3 channels"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be above 0"),
        ({"name": "resnet81"}, "no model 'resnet81': did you mean 'resnet18'"),
        ({"name": "resnet18.a1_in1"}, "no weights 'a1_in1': did you mean 'a1_in1k'"),
        ({"taps": ["layr4"]}, "no layer 'layr4' in ResNet: did you mean 'layer4'"),
        ({"taps": {"tokens": "layer4"}}, "taps: 'tokens' is the name of a feature"),
        ({"options": {"drop_pth_rate": 0.1}}, "options .* do not fit timm's 'test_resnet'.*drop_pth_rate"),
        ({"options": {"num_classes": 3}}, "options: 'num_classes' cannot be given there"),
        ({"pretrained": True, "weights": "a.pt"}, "pretrained and weights .* exclude each other"),
        ({"drop_classifier": True}, "drop_classifier .* weights is not given"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        built(**{"name": "test_resnet", **arguments})
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded_ask_for_a_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="pretrained: timm's weights of 'test_vit' cannot be downloaded .* as weights"):
        built("test_vit", pretrained=True)


def test_gray_images_are_normalized_by_the_mean_of_the_colors():
    network = built(shape=(1, 64, 64))
    own = torch.tensor(network.model.pretrained_cfg["mean"]).mean()
    assert network.mean.shape == (1, 1, 1)
    assert torch.allclose(network.mean, own)
    assert network.spec.logits == (5,)


def test_the_class_count_can_be_its_own():
    network = Timm("test_resnet", num_classes=11)
    network.build(5, SHAPE)
    assert network.spec.logits == (11,)


def test_options_reach_the_model():
    network = built("test_vit", options={"patch_size": 8})
    assert network.spec.grid == (8, 12)


def test_the_state_has_the_models_own_names_and_loads_into_timm():
    network = built()
    state = {key.removeprefix("model."): tensor for key, tensor in network.state_dict().items()}
    timm.create_model("test_resnet", num_classes=5).load_state_dict(state)


def test_a_tap_before_an_in_place_activation_holds_the_true_output():
    network = built(taps=["bn1"]).eval()
    model = network.model
    assert model.act1.inplace
    with torch.no_grad():
        image = images()
        assert torch.equal(network(image).maps["bn1"], model.bn1(model.conv1(network.prepare(image))))
        assert network(image).maps["bn1"].min() < 0


def test_features_have_the_dtype_of_the_weights():
    network = built()
    network.model.bfloat16()
    assert network.mean.dtype == torch.float32
    assert network(images()).logits.dtype == torch.bfloat16


def test_one_forward_pass_runs_dropout_and_classifier_once():
    network = built("test_vit", options={"drop_rate": 0.5})
    calls = []
    network.model.head.register_forward_hook(lambda *_: calls.append(1))
    features = network(images())
    assert len(calls) == 1
    assert torch.allclose(
        network.model.head(features.embedding), features.logits
    )  # the embedding of the same dropout mask


def test_a_pass_compiles_into_one_graph():
    network = built(taps=["bn1"]).eval()
    compiled = copy.deepcopy(network)
    compiled.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in ("logits", "embedding", "tokens", "bn1"):
            assert torch.equal(compiled(images())[name], network(images())[name])
    assert list(compiled.state_dict()) == list(network.state_dict())


def test_a_deep_copy_sees_for_itself():
    network = built().eval()
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert other(images()).embedding.abs().max() < network(images()).embedding.abs().max()


def test_gradients_of_taps_reach_the_network():
    network = built(taps=["layer2"])
    network(images()).maps["layer2"].square().mean().backward()
    assert network.model.conv1[0].weight.grad.any()
    assert network.model.fc.weight.grad is None
