"""The networks of the CRD benchmark."""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from torch import nn

import distill.networks.cifar
from distill.errors import UserError
from distill.export import export
from distill.networks import Timm, WeightsFile, load_weights
from distill.networks.cifar import NETWORKS
from tests.networks.cifar_reference import REFERENCES, Checkpoint, Seen, resnet18

IMAGE = (3, 32, 32)

NARROW = [(16, 32), (16, 32), (32, 16), (64, 8)]
FOUR = [(32, 32), (64, 32), (128, 16), (256, 8)]
WIDE = [(16, 32), (32, 32), (64, 16), (128, 8)]
VGG = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]

# name -> parameters for 100 classes, (channels, side) of stem and stages, width of the embedding
PUBLISHED = {
    "resnet20_cifar": (278_324, NARROW, 64),
    "resnet32_cifar": (472_756, NARROW, 64),
    "resnet56_cifar": (861_620, NARROW, 64),
    "resnet110_cifar": (1_736_564, NARROW, 64),
    "resnet8x4_cifar": (1_233_540, FOUR, 256),
    "resnet32x4_cifar": (7_433_860, FOUR, 256),
    "resnet18_cifar": (11_220_132, [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], 512),
    "resnet50_cifar": (23_705_252, [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
    "wrn_16_2_cifar": (703_284, WIDE, 128),
    "wrn_40_2_cifar": (2_255_156, WIDE, 128),
    "wrn_40_1_cifar": (569_780, NARROW, 64),
    "vgg8_cifar": (3_965_028, VGG, 512),
    "vgg13_cifar": (9_462_180, VGG, 512),
    "mobilenetv2_half_cifar": (812_836, [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "shufflenetv1_cifar": (949_258, [(24, 32), (240, 16), (480, 8), (960, 4)], 960),
    "shufflenetv2_cifar": (1_355_528, [(24, 32), (116, 16), (232, 8), (464, 4)], 1024),
}

ONE_OF_EACH = [
    "resnet8_cifar",
    pytest.param("resnet50_cifar", marks=pytest.mark.slow),
    "wrn_16_1_cifar",
    "vgg8_cifar",
    "mobilenetv2_half_cifar",
    "shufflenetv1_cifar",
    "shufflenetv2_cifar",
]


def places(name: str) -> list[str]:
    """The layers whose outputs are the benchmark's features, in its order."""
    stages = 4 if name.startswith(("resnet18", "resnet50", "vgg", "mobilenet")) else 3
    return ["stem", *(f"stages.{stage}" for stage in range(stages)), "pool"]


def built(name: str, taps: list[str] | str | None = None, num_classes: int = 100, **arguments) -> Timm:
    torch.manual_seed(0)
    network = Timm(name, taps=taps, **arguments)
    network.build(num_classes, IMAGE)
    return network


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, *IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_shapes_are_the_published_ones(name):
    parameters, stages, width = PUBLISHED[name]
    network = built(name, places(name))
    assert sum(weight.numel() for weight in network.model.parameters()) == parameters
    *maps, pooled = network.spec.maps.values()
    assert maps == [(channels, side, side) for channels, side in stages]
    assert pooled == network.spec.embedding == (width,)
    assert network.spec.logits == (100,)
    assert network.spec.grid == (stages[-1][1], stages[-1][1])
    assert network.spec.tokens == (stages[-1][1] ** 2, network.model.num_features)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_tells_of_its_maps_is_so(name):
    network = built(name, places(name)[:-1])
    listed = [(info["num_chs"], 32 // info["reduction"]) for info in network.model.feature_info]
    assert [info["module"] for info in network.model.feature_info] == places(name)[:-1]
    assert listed == [shape[:2] for shape in network.spec.maps.values()]


def of_benchmark(name: str) -> tuple[Checkpoint, Seen]:
    """A checkpoint under the benchmark's names, and what the benchmark's network with it sees of normalized images."""
    checkpoint = Checkpoint()
    return checkpoint, REFERENCES[name](checkpoint, images().double() * 2 - 1)


@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in REFERENCES]
)
def test_a_checkpoint_of_the_benchmark_gives_its_features_and_logits(name, tmp_path):
    checkpoint, expected = of_benchmark(name)
    accuracy = torch.tensor(70.0)
    torch.save({"epoch": 240, "model": dict(checkpoint), "best_acc": accuracy}, tmp_path / "ckpt_epoch_240.pth")
    layers = [*places(name), *timm.create_model(name).pre_activations]
    network = built(name, layers, weights=tmp_path / "ckpt_epoch_240.pth", mean=[0.5], std=[0.5]).eval()
    network.model.double()
    with torch.no_grad():
        features = network(images().double())
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(features.logits, expected.logits)
    close(features.embedding, expected.features[-1])
    for place, feature in zip(places(name), expected.features, strict=True):
        close(features.maps[place], feature)
    for layer, pre_activation in zip(network.model.pre_activations, expected.pre_activations, strict=True):
        close(features.maps[layer], pre_activation)
    assert expected.logits.std() > 0.01


def test_mdistillers_resnet18_of_the_public_code_is_a_teacher_on_tiny_imagenet_too(tmp_path):
    checkpoint = Checkpoint()
    normalized = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    expected = resnet18(checkpoint, normalized, classes=200)
    torch.save({"model": dict(checkpoint)}, tmp_path / "ti_res18")
    network = Timm("resnet18_cifar", weights=tmp_path / "ti_res18", mean=[0.0], std=[1.0], taps="benchmark")
    network.build(200, (3, 64, 64))
    network.eval().model.double()
    with torch.no_grad():
        features = network(normalized)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(features.logits, expected.logits)
    for number, (feature, before) in enumerate(zip(expected.features[1:-1], expected.pre_activations, strict=True), 1):
        close(features[f"stage{number}"], feature)
        close(features[f"pre{number}"], before)


@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_the_taps_of_the_benchmark_have_the_same_names_in_every_network(name):
    network = built(name, "benchmark", num_classes=10)
    model, taps = network.model, network.tap_layers
    stages = [f"stages.{number}" for number in range(len(model.stages))]
    assert [taps[f"stage{number + 1}"] for number in range(len(stages))] == stages
    assert tuple(taps[f"pre{number + 1}"] for number in range(len(stages))) == model.pre_activations
    assert (taps["stem"], taps["last"]) == ("stem", stages[-1])
    assert len(taps) == 2 * len(stages) + 3
    assert network.spec["parts"][1:] == (8, 8)
    assert all(network.spec[f"pre{n}"] == network.spec[f"stage{n}"] for n in range(1, len(stages) + 1))


def test_the_taps_of_the_benchmark_are_refused_in_another_network():
    with pytest.raises(
        UserError, match="taps 'benchmark' are those of the CRD benchmark's .* 'test_resnet' is no such"
    ):
        built("test_resnet", "benchmark")
    with pytest.raises(UserError, match="taps must be a list of layers, name -> layer, or 'benchmark', given 'stem'"):
        Timm("resnet8_cifar", taps="stem")


WRAPPINGS = {
    "bare": lambda state: state,
    "final": lambda state: {"opt": argparse.Namespace(model="vgg13"), "model": state},
    "DDP": lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    "before batches were counted": lambda state: {"model": {k: v for k, v in state.items() if "batches" not in k}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["wrn_16_1_cifar", "mobilenetv2_half_cifar"])
def test_checkpoints_of_the_benchmark_are_read_from_its_files(name, zipped, wrapping, tmp_path):
    checkpoint, _ = of_benchmark(name)
    torch.save(WRAPPINGS[wrapping](dict(checkpoint)), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model = timm.create_model(name)
    load_weights(model, tmp_path / "a.pth", classifier=["fc"])
    convolutions = [tensor for tensor in checkpoint.values() if tensor.ndim == 4]
    own = [tensor for tensor in model.state_dict().values() if tensor.ndim == 4]
    assert len(own) == len(convolutions)
    assert {float(tensor.sum()) for tensor in own} == {float(tensor.sum()) for tensor in convolutions}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("resnet8_cifar", "vgg8_cifar", "wrn_16_1_cifar")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in (getattr(each, "values", [each])[0] for each in ONE_OF_EACH)
    ],
)
def test_whole_checkpoints_of_mdistillers_public_code_give_the_network_of_the_prefix(name, tmp_path):
    student = dict(of_benchmark(name)[0])
    teacher = {key: tensor * 2 for key, tensor in student.items()}
    distiller = {
        **{f"module.student.{key}": tensor for key, tensor in student.items()},
        **{f"module.teacher.{key}": tensor for key, tensor in teacher.items()},
        "module.abfs.0.conv1.0.weight": torch.ones(2, 2, 1, 1),
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.05, "params": [0]}]}
    whole = {"epoch": 240, "model": distiller, "optimizer": optimizer, "best_acc": 75.0}
    torch.save(whole, tmp_path / "latest")
    torch.save({"model": {f"module.{key}": tensor for key, tensor in teacher.items()}}, tmp_path / "teacher_best")
    model, expected = timm.create_model(name), timm.create_model(name)
    with pytest.raises(UserError, match="'model.module.student', 'model.module.teacher': .* prefix: student"):
        load_weights(model, tmp_path / "latest", classifier=["fc"])
    load_weights(expected, tmp_path / "teacher_best", classifier=["fc"])
    load_weights(model, WeightsFile(tmp_path / "latest", "teacher"), classifier=["fc"])
    for tensor, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    load_weights(model, WeightsFile(tmp_path / "latest", "module.student"), classifier=["fc"])
    for tensor, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor * 2, other)


def test_a_whole_checkpoint_of_mdistillers_public_code_with_one_network_that_fits_needs_no_prefix(tmp_path):
    student, teacher = dict(of_benchmark("vgg8_cifar")[0]), dict(of_benchmark("resnet8_cifar")[0])
    distiller = {f"module.student.{key}": tensor for key, tensor in student.items()}
    distiller |= {f"module.teacher.{key}": tensor for key, tensor in teacher.items()}
    torch.save({"model": distiller}, tmp_path / "latest")
    for name, key, tensor in (
        ("vgg8_cifar", "stem.blocks.0.conv", "block0.0"),
        ("resnet8_cifar", "stem.conv", "conv1"),
    ):
        model = timm.create_model(name)
        load_weights(model, tmp_path / "latest", classifier=["fc"])
        stored = student if name == "vgg8_cifar" else teacher
        assert torch.equal(model.get_submodule(key).weight, stored[f"{tensor}.weight"])


def test_the_classifier_of_a_benchmark_checkpoint_can_be_left_out(tmp_path):
    checkpoint, _ = of_benchmark("vgg8_cifar")
    torch.save({"model": dict(checkpoint)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="has 100 classes, but the network has 10: set drop_classifier: true"):
        built("vgg8_cifar", num_classes=10, weights=tmp_path / "a.pth")
    network = built("vgg8_cifar", num_classes=10, weights=tmp_path / "a.pth", drop_classifier=True)
    assert torch.equal(network.model.stem.blocks[0].conv.weight, checkpoint["block0.0.weight"])


def test_a_checkpoint_of_another_network_is_refused_in_one_sentence(tmp_path):
    checkpoint, _ = of_benchmark("resnet8_cifar")
    torch.save({"model": dict(checkpoint)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="fits ResNet only in part: .* missing .*'stages") as caught:
        built("resnet20_cifar", weights=tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_own_weights_come_back(name, tmp_path):
    model, other = timm.create_model(name), timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    for one, same in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_training_step_reaches_every_weight_and_stays_finite(name):
    network = built(name, num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        logits = network(images(8)).logits
        loss = nn.functional.cross_entropy(logits, torch.arange(8) % 10)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name", ["resnet110_cifar", "resnet18_cifar", "resnet50_cifar", "wrn_40_2_cifar", "vgg13_cifar"]
)
def test_convolutions_begin_as_the_benchmarks_do(name):
    torch.manual_seed(0)
    for layer in timm.create_model(name).modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels)) ** 0.5
            tolerance = 5 / (2 * layer.weight.numel()) ** 0.5  # five standard errors of a standard deviation
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=tolerance)
            assert layer.bias is None or not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()


@pytest.mark.parametrize(("name", "spread"), [("vgg8_cifar", 0.01), ("mobilenetv2_half_cifar", 0.01)])
def test_some_classifiers_begin_small(name, spread):
    classifier = timm.create_model(name).get_classifier()
    assert float(classifier.weight.detach().std()) == pytest.approx(spread, rel=0.05)
    assert not classifier.bias.any()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_timms_ways_lead_to_the_same(name):
    model = timm.create_model(name, num_classes=7).eval()
    image = images()
    final = model.forward_features(image)
    assert torch.equal(model.forward_head(final), model(image))
    embedding = model.forward_head(final, pre_logits=True)
    torch.testing.assert_close(embedding, final.mean((2, 3)))
    assert torch.equal(model.get_classifier()(embedding), model(image))
    assert embedding.shape == (2, model.num_features)
    model.reset_classifier(0)
    assert torch.equal(model(image), embedding)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert model.num_classes == 3


def test_only_the_average_is_pooled():
    with pytest.raises(ValueError, match="'avg', given 'max'"):
        timm.create_model("resnet8_cifar").reset_classifier(5, global_pool="max")


def test_images_are_normalized_by_the_statistics_of_cifar100():
    network = built("resnet8_cifar")
    assert network.mean.flatten().tolist() == pytest.approx([0.5071, 0.4867, 0.4408])
    assert network.std.flatten().tolist() == pytest.approx([0.2675, 0.2565, 0.2761])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 48)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_other_images_are_taken(name, shape):
    network = Timm(name)
    network.build(10, shape)
    assert network.spec.logits == (10,)
    assert network(torch.rand(2, *shape)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "resnet8x4_cifr"}, "no model 'resnet8x4_cifr': did you mean 'resnet8x4_cifar'"),
        (
            {"name": "resnet8_cifar", "pretrained": True},
            "timm's weights of 'resnet8_cifar' cannot be downloaded .* as weights",
        ),
        ({"name": "resnet8_cifar", "taps": ["stages.3"]}, "no layer 'stages.3' in ResNet: did you mean 'stages.2'"),
        ({"name": "resnet8_cifar", "options": {"drop_rate": 0.1}}, "options .* do not fit timm's 'resnet8_cifar'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        built(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenetv1_cifar", "wrn_16_1_cifar"])
@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_an_exported_network_gives_the_same_logits(name, format, tmp_path):
    network = built(name).eval()
    scope = {"image": images(3)}
    with torch.no_grad():
        exec(export(network, tmp_path / f"student.{format}", format), scope)
        torch.testing.assert_close(scope["logits"], network(images(3)).logits)


@pytest.mark.slow
def test_the_lines_that_load_an_export_run_in_a_new_process(tmp_path):
    lines = export(built("resnet8_cifar"), tmp_path / "a.safetensors")
    code = f"import torch; image = torch.rand(2, 3, 32, 32)\n{lines}\nassert logits.shape == (2, 100)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_are_registered_with_timm():
    assert set(timm.list_models(module="cifar")) == set(distill.networks.cifar.NETWORKS)
    assert all(hasattr(distill.networks.cifar, name) for name in distill.networks.cifar.__all__)
    assert set(PUBLISHED) | set(REFERENCES) <= set(NETWORKS)
