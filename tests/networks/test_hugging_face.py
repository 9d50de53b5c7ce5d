"""Image models of transformers: random ones of each family, saved and loaded by folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no request can leave

import copy
import json

import pytest
import torch

from distill.errors import UserError
from distill.networks import HuggingFace
from distill.networks.hugging_face_config import size_arguments
from distill.networks.teacher import FrozenTeacher

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CNN = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
FAMILIES = {  # configuration, image size, grid, prefix tokens, name of the embedding in the output
    "ViT": (lambda: transformers.ViTConfig(**VIT, image_size=32, patch_size=8), (32, 48), (4, 6), 1),
    "DeiT": (lambda: transformers.DeiTConfig(**VIT, image_size=32, patch_size=8), (32, 48), (4, 6), 2),
    "BEiT": (lambda: transformers.BeitConfig(**VIT, image_size=32, patch_size=8), (32, 32), (4, 4), 1),
    "Hiera": (
        lambda: transformers.HieraConfig(
            embed_dim=16, image_size=[64, 64], depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_layers=4
        ),
        (64, 64),
        (2, 2),
        0,
    ),
    "DINOv2": (lambda: transformers.Dinov2Config(**DINO, image_size=28, patch_size=14), (28, 42), (2, 3), 1),
    "DINOv2 with registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**DINO, image_size=28, patch_size=14),
        (42, 28),
        (3, 2),
        5,
    ),
    "DINOv3": (lambda: transformers.DINOv3ViTConfig(**VIT, image_size=32, patch_size=16), (32, 64), (2, 4), 1),
    "DINOv3 ConvNeXt": (lambda: transformers.DINOv3ConvNextConfig(**CNN), (64, 96), (2, 3), 1),
    "Swin": (lambda: transformers.SwinConfig(**SWIN), (32, 64), (4, 8), 0),
    "ConvNeXt": (lambda: transformers.ConvNextConfig(**CNN), (64, 96), (2, 3), None),
    "CLIP": (lambda: transformers.CLIPVisionConfig(**VIT, image_size=32, patch_size=8), (32, 40), (4, 5), 1),
    "SigLIP": (lambda: transformers.SiglipVisionConfig(**VIT, image_size=32, patch_size=8), (32, 40), (4, 5), 0),
    "ResNet": (
        lambda: transformers.ResNetConfig(embedding_size=8, **CNN, layer_type="basic"),
        (64, 96),
        (2, 3),
        None,
    ),
}
PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"height": 32, "width": 48}}


def saved(folder, config, auto_class="AutoModel", processor=None, **settings):
    torch.manual_seed(0)
    for name, value in settings.items():
        setattr(config, name, value)
    if auto_class == "AutoModelForImageClassification":  # which DeiT's configuration has to say
        config.architectures = [type(config).__name__.replace("Config", "ForImageClassification")]
    model = getattr(transformers, auto_class).from_config(config).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def built(network, shape=(3, 32, 48), classes=4, learns=True):
    network.build(classes, shape, learns)
    return network.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_headless_model_of_each_family_gives_its_tokens_grid_and_embedding(family, tmp_path):
    configuration, size, grid, prefix = FAMILIES[family]
    model = saved(tmp_path, configuration())
    network = built(HuggingFace(str(tmp_path)), (3, *size))
    image = torch.rand(2, 3, *size)
    features = network(image)
    expected = model(image, **size_arguments(model, model.config, (3, *size)))
    hidden = expected.last_hidden_state
    tokens = hidden.flatten(2).mT if prefix is None else hidden[:, prefix:]
    assert features.logits is None
    assert features.grid == grid
    torch.testing.assert_close(features["tokens"], tokens)
    torch.testing.assert_close(features["embedding"], expected.pooler_output.flatten(1))


@pytest.mark.parametrize("family", ["ViT", "DeiT", "BEiT", "DINOv2", "Swin", "Hiera", "ConvNeXt", "ResNet"])
def test_a_classification_model_gives_logits_and_the_input_of_its_classifier(family, tmp_path):
    configuration, size, grid, _ = FAMILIES[family]
    model = saved(tmp_path, configuration(), "AutoModelForImageClassification", num_labels=4)
    network = built(HuggingFace(str(tmp_path)), (3, *size))
    image = torch.rand(2, 3, *size)
    features = network(image)
    expected = model(image, **size_arguments(model, model.config, (3, *size)))
    torch.testing.assert_close(features["logits"], expected.logits)
    classifier = network.model.get_submodule(network.classifier[0])
    logits = torch.nn.functional.linear(features["embedding"], classifier.weight, classifier.bias)
    torch.testing.assert_close(logits, features["logits"])
    assert features.grid == grid
    torch.testing.assert_close(features["tokens"], copy.deepcopy(network)(image)["tokens"])


@pytest.mark.parametrize("family", ["DINOv2 with registers", "DINOv3", "Swin", "ConvNeXt", "ResNet"])
def test_a_backbone_gives_its_last_map(family, tmp_path):
    configuration, size, grid, _ = FAMILIES[family]
    model = saved(tmp_path, configuration(), "AutoBackbone")
    network = built(HuggingFace(str(tmp_path), auto_class="AutoBackbone"), (3, *size))
    image = torch.rand(2, 3, *size)
    last = model(image).feature_maps[-1]
    features = network(image)
    assert features.grid == grid
    torch.testing.assert_close(features["tokens"], last.flatten(2).mT)
    torch.testing.assert_close(features["embedding"], last.mean((2, 3)))


def test_mean_std_and_size_are_the_image_processors(tmp_path):
    saved(tmp_path, FAMILIES["ViT"][0](), processor=PROCESSOR)
    network = built(HuggingFace(str(tmp_path)), (3, 20, 20))
    assert network.image_size == (32, 48)
    assert network.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert network.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    own = built(HuggingFace(str(tmp_path), image_size=16, mean=[0.0], std=[1.0]), (3, 20, 20))
    assert own.image_size == (16, 16)
    assert own(torch.rand(1, 3, 20, 20)).grid == (2, 2)


def test_a_pooling_without_trained_weights_is_replaced_by_the_class_token(tmp_path):
    model = saved(tmp_path, FAMILIES["ViT"][0](), "AutoModelForImageClassification", num_labels=4)
    network = built(HuggingFace(str(tmp_path), auto_class="AutoModel"))
    image = torch.rand(2, 3, 32, 48)
    hidden = model.vit(image, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(network(image)["embedding"], hidden[:, 0])


def test_layers_are_tapped_by_name_and_a_frozen_teacher_is_deterministic(tmp_path):
    saved(tmp_path, FAMILIES["ViT"][0]())
    teacher = FrozenTeacher(built(HuggingFace(str(tmp_path), taps={"early": "layers.0"})))
    image = torch.rand(2, 3, 32, 48)
    assert teacher(image)["early"].shape == (2, 25, 32)
    assert torch.equal(teacher(image)["tokens"], teacher(image)["tokens"])
    assert not teacher(image)["tokens"].requires_grad


def test_random_weights_and_a_new_classifier(tmp_path):
    saved(tmp_path, FAMILIES["ViT"][0](), "AutoModelForImageClassification", num_labels=7)
    assert built(HuggingFace(str(tmp_path), num_classes=4)).spec.logits == (4,)
    assert built(HuggingFace(str(tmp_path), num_classes=7)).spec.logits == (7,)
    random = built(HuggingFace(str(tmp_path), pretrained=False))
    assert random.spec.logits == (4,)
    random.train()(torch.rand(2, 3, 32, 48))["logits"].sum().backward()


STRIDES = {
    "ViT": {8: 32, "block50": 32},
    "DeiT": {8: 32, "block100": 32},
    "BEiT": {8: 32},
    "DINOv2": {14: 32, "block50": 32},
    "DINOv2 with registers": {14: 32},
    "DINOv3": {16: 32, "block50": 32},
    "Hiera": {4: 16, 8: 32, 16: 64, 32: 128},
    "Swin": {4: 16, 8: 32},
    "ConvNeXt": {4: 8, 8: 16, 16: 24, 32: 32},
    "CLIP": {8: 32},
    "SigLIP": {8: 32, "block50": 32},
    "ResNet": {2: 8, 4: 8, 8: 16, 16: 24, 32: 32},
}


@pytest.mark.parametrize("family", STRIDES)
def test_taps_by_stride_are_maps_of_that_resolution(family, tmp_path):
    configuration, size, _, _ = FAMILIES[family]
    saved(tmp_path, configuration())
    names = [name if isinstance(name, str) else f"stride{name}" for name in STRIDES[family]]
    network = built(HuggingFace(str(tmp_path), taps=names), (3, *size))
    features = network(torch.rand(2, 3, *size))
    for name, (stride, width) in zip(names, STRIDES[family].items(), strict=True):
        stride = max(key for key in STRIDES[family] if isinstance(key, int)) if isinstance(stride, str) else stride
        assert features[name].shape == (2, width, size[0] // stride, size[1] // stride)
    tokens = features[names[0]].flatten(2).mT
    if family in ("DeiT", "DINOv2", "DINOv3"):  # whose last layer of that stride gives the tokens
        torch.testing.assert_close(tokens, features["tokens"])


def test_a_teacher_keeps_its_own_classifier_or_gives_no_logits(tmp_path):
    model = saved(tmp_path, FAMILIES["ViT"][0](), "AutoModelForImageClassification", num_labels=7)
    teacher = built(HuggingFace(str(tmp_path)), learns=False)
    image = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(teacher(image)["logits"], model(image, interpolate_pos_encoding=True).logits)
    headless = built(HuggingFace(str(tmp_path), num_classes=0), learns=False)
    assert headless.spec.logits is None
    torch.testing.assert_close(headless(image)["embedding"], teacher(image)["embedding"])
    with pytest.raises(UserError, match="num_classes: a teacher's classifier of 4 classes would be random"):
        built(HuggingFace(str(tmp_path), num_classes=4), learns=False)


def test_two_classifiers_are_averaged_and_so_is_their_input(tmp_path):
    config = transformers.DeiTConfig(**VIT, image_size=32, patch_size=8, num_labels=4)
    model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    model.save_pretrained(tmp_path)
    network = built(HuggingFace(str(tmp_path)), (3, 32, 32))
    features = network(torch.rand(2, 3, 32, 32))
    assert list(network.classifier) == ["cls_classifier", "distillation_classifier"]
    assert not network.spec.classifies
    assert features["embedding"].shape == (2, 32)


def test_gray_images_are_repeated_to_the_models_channels(tmp_path):
    saved(tmp_path, FAMILIES["ViT"][0]())
    network = built(HuggingFace(str(tmp_path), mean=[0.1, 0.2, 0.3]), (1, 32, 48))
    image = torch.rand(2, 1, 32, 48)
    color = built(HuggingFace(str(tmp_path), mean=[0.1, 0.2, 0.3]))(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(network(image)["embedding"], color["embedding"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "./nowhere"}, "name: there is no folder './nowhere'"),
        ({"name": "nobody/nothing"}, "name: the model of 'nobody/nothing' cannot be loaded on the hub or in its cache"),
        ({"auto_class": "AutoBackbone"}, "auto_class: '.*' has no AutoBackbone"),
        ({"image_size": 30}, r"patches of 8 x 8 pixels, which do not divide 30 x 30"),
        ({"options": {"trust_remote_code": True}}, "would run code from the hub"),
        ({}, r"has 7 classes and the data 4: give num_classes 4 for a new classifier, 7 to keep"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, message, tmp_path):
    saved(tmp_path, FAMILIES["ViT"][0](), "AutoModelForImageClassification", num_labels=7)
    with pytest.raises(UserError, match=message):
        built(HuggingFace(**{"name": str(tmp_path), **arguments}))


def test_a_folder_without_weights_and_one_with_too_few_are_refused(tmp_path):
    model = saved(tmp_path, FAMILIES["ViT"][0]())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="name: the AutoModel of '.*' cannot be loaded in that folder"):
        built(HuggingFace(str(tmp_path)))
    state = model.state_dict()
    del state["layernorm.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 1 of the weights of ViTModel \(layernorm.weight\)"):
        built(HuggingFace(str(tmp_path)))


def test_a_broken_image_processor_is_refused_and_what_it_does_not_do_is_left_out(tmp_path):
    saved(tmp_path, transformers.ViTConfig(**VIT, image_size=32, patch_size=8), processor=PROCESSOR)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**PROCESSOR, "do_normalize": False, "do_flip_channel_order": True}))
    network, images = built(HuggingFace(str(tmp_path))), torch.rand(2, 3, 32, 48)
    assert (network.mean.flatten().tolist(), network.std.flatten().tolist()) == ([0.0] * 3, [1.0] * 3)
    file.write_text(json.dumps({**PROCESSOR, "do_normalize": False}))
    assert torch.equal(network(images).tokens, built(HuggingFace(str(tmp_path)))(images.flip(1)).tokens)
    file.write_text(json.dumps(PROCESSOR)[:40])
    with pytest.raises(UserError, match="the image processor of .* cannot be loaded in that folder"):
        built(HuggingFace(str(tmp_path)))


def test_options_reach_a_model_without_weights(tmp_path):
    saved(tmp_path, transformers.ViTConfig(**VIT, image_size=32, patch_size=8))
    network = built(HuggingFace(str(tmp_path), pretrained=False, options={"attn_implementation": "eager"}), (3, 32, 32))
    assert network.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="options: .* does not fit .*nonsense"):
        built(HuggingFace(str(tmp_path), pretrained=False, options={"nonsense": 1}), (3, 32, 32))


def test_a_network_rebuilt_without_weights_pools_as_the_one_that_was_trained(tmp_path):
    model = saved(tmp_path, transformers.ViTConfig(**VIT, image_size=32, patch_size=8))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    model.save_pretrained(tmp_path, state_dict=weights)
    trained, rebuilt = (built(HuggingFace(str(tmp_path), pretrained=given), (3, 32, 32)) for given in (True, False))
    rebuilt.restore_facts(trained.facts())
    rebuilt.load_state_dict(trained.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(rebuilt(images).embedding, trained(images).embedding)
