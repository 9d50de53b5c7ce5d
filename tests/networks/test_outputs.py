"""Modules that return an embedding, tokens, or several things, and programs of torch.export."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from distill.errors import UserError
from distill.networks import FrozenTeacher, TorchModule

SHAPE = (3, 32, 48)
Pair = namedtuple("Pair", ["states", "pooled"])


class Backbone(nn.Module):
    """A backbone without classifier that returns what `wrap` makes of its tokens and its embedding."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.mix = nn.Linear(6, 6)
        self.wrap = wrap

    def forward(self, image):
        patches = self.patches(image).flatten(2).mT
        states = self.mix(torch.cat([self.token.expand(len(image), -1, -1), patches], 1))
        return self.wrap(states, states[:, 0])


def built(module=None, classes=5, learns=False, **arguments) -> TorchModule:
    network = TorchModule(module, **arguments)
    network.build(classes, SHAPE, learns)
    return network.eval()


def images(shape=SHAPE) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))


CASES = {
    "embedding": (lambda states, pooled: pooled, "embedding"),
    "tokens": (lambda states, pooled: states, "tokens"),
    "dict": (lambda states, pooled: {"pooled": pooled, "x": {"states": states}}, {"embedding": "pooled"}),
    "nested": (
        lambda states, pooled: {"pooled": pooled, "x": {"states": states}},
        {"embedding": "pooled", "tokens": "x.states"},
    ),
    "tuple": (lambda states, pooled: (states, pooled), {"tokens": 0, "embedding": 1}),
    "named tuple": (Pair, {"tokens": "states", "embedding": 1}),
    "object": (
        lambda states, pooled: SimpleNamespace(states=[states], pooled=pooled),
        {"tokens": "states.0", "embedding": "pooled"},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("learns", [True, False])
def test_a_part_of_what_a_module_returns_is_its_embedding_or_its_tokens(case, learns):
    wrap, output = CASES[case]
    torch.manual_seed(0)
    network = built(Backbone(wrap), learns=learns, output=output, prefix_tokens=1)
    features = network(images())
    plain = Backbone(lambda states, pooled: (states, pooled))
    plain.load_state_dict(network.model.state_dict())
    states, pooled = plain(images())
    assert features.logits is None
    if "tokens" in output:
        assert features.grid == (4, 6)
        torch.testing.assert_close(features.tokens, states[:, 1:])
    else:
        assert features.tokens is None
    expected = states[:, 1:].mean(1) if output == "tokens" else pooled
    torch.testing.assert_close(features.embedding, expected)


def test_a_map_is_tokens_and_their_mean_the_embedding():
    network = built(nn.Conv2d(3, 6, 8, stride=8), output="tokens")
    features = network(images())
    cells = network.model(images())
    torch.testing.assert_close(features.tokens, cells.flatten(2).mT)
    torch.testing.assert_close(features.embedding, cells.mean((2, 3)))


class Classifying(Backbone):
    def __init__(self, classes) -> None:
        super().__init__(None)
        self.head = nn.Linear(6, classes)
        self.wrap = lambda states, pooled: {"logits": self.head(pooled), "states": states}


def test_logits_among_others_have_the_classifiers_input_as_their_embedding():
    network = built(Classifying(5), learns=True, output={"logits": "logits", "tokens": "states"}, prefix_tokens=1)
    features = network(images())
    assert network.spec.classifies
    torch.testing.assert_close(network.model.head(features.embedding), features.logits)


def test_a_teacher_may_have_logits_of_other_classes_if_it_says_so():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))
    assert built(module, output="logits").spec.logits == (7,)
    with pytest.raises(UserError, match="7 logits, but the data have 5 classes: set output: embedding .* or output:"):
        built(module)
    with pytest.raises(UserError, match="7 logits, but the data have 5 classes$"):
        built(module, output="logits", learns=True)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (None, r"must return logits \[B, K\], but returns dict with 'pooled', 'states': say what it is with output"),
        ("embeding", "output .*'embeding'.* did you mean 'embedding'|output .*embeding"),
        ({"embedding": "poled"}, "output: .* returns no 'poled', but dict with 'pooled', 'states'"),
        ({"embedding": "states.3"}, r"returns no 'states.3', but a tensor of shape"),
        ({"tokens": "states", "logits": "pooled"}, "returns 6 logits, but the data have 5 classes"),
        ({"embedding": "states"}, r"embedding of .* must be \[B, d\] or \[B, d, h, w\], given \(2, 25, 6\)"),
    ],
)
def test_a_mistake_is_one_sentence(output, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        built(Backbone(lambda states, pooled: {"pooled": pooled, "states": states}), output=output, learns=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "needs either module or program"),
        ({"program": "a.pt2", "module": nn.Identity()}, "needs either module or program"),
        ({"program": "a.pt2", "weights": "b.pt"}, "weights: a program holds its own"),
        ({"module": nn.Identity(), "output": "tokens", "tokens": "x"}, "tokens is given both as a layer .'x'. and in"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        TorchModule(**arguments)


def exported(path, batch=None, size=SHAPE, name="test_resnet", dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, img_size=size[1:], **arguments) if "vit" in name else None
    model = (model or timm.create_model(name, num_classes=7, **arguments)).eval().to(dtype)
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    program = torch.export.export(model, (torch.rand(batch or 2, *size, dtype=dtype),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return model


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "teacher.pt2"
    return path, exported(path)


def test_a_program_teaches_and_its_layers_keep_their_names(program):
    path, model = program
    network = built(program=path, output="logits", taps={"mid": "layer2"}, tokens="layer3", layout="NCHW")
    teacher = FrozenTeacher(network)
    image = torch.rand(3, *SHAPE)
    features = teacher(image)
    torch.testing.assert_close(features.logits, model(image))
    torch.testing.assert_close(model.fc(features.embedding), features.logits)
    assert features.grid == (2, 3)
    assert features["mid"].shape == (3, 48, 4, 6)
    assert network.name == "TorchModule(teacher.pt2)"


def test_what_a_program_bakes_in_is_said(program):
    path, _ = program
    network = TorchModule(program=path, output="logits", image_size=(32, 48))
    network.build(5, (3, 20, 20), learns=False)
    with pytest.raises(UserError, match=r"takes images of 32 x 48 only, .* given 20 x 20: set image_size: \[32, 48\]"):
        TorchModule(program=path).build(5, (3, 20, 20), learns=False)
    with pytest.raises(UserError, match="cannot learn, as its mode is baked in"):
        built(program=path, learns=True)
    with pytest.raises(UserError, match=r"computes in torch.float32 only, as torch.export baked in, not in torch.bfl"):
        FrozenTeacher(built(program=path, output="logits"), dtype=torch.bfloat16)


@pytest.mark.slow
def test_a_baked_in_batch_is_refused(tmp_path):
    exported(tmp_path / "static.pt2", batch=4)
    with pytest.raises(UserError, match="takes batches of 4 images only.* dynamic_shapes"):
        built(program=tmp_path / "static.pt2")


@pytest.mark.slow
def test_a_programs_dtype_is_its_own_whatever_the_trainers(tmp_path):
    model = exported(tmp_path / "half.pt2", dtype=torch.bfloat16, name="test_vit")
    teacher = FrozenTeacher(built(program=tmp_path / "half.pt2", output="logits"))
    parent = nn.ModuleList([teacher]).double()
    image = torch.rand(2, *SHAPE)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = parent[0](image).logits
    torch.testing.assert_close(logits, model(image.bfloat16()))


@pytest.mark.parametrize("content", [None, b"", b"PK nothing"])
def test_what_is_no_program_is_refused(content, tmp_path):
    path = tmp_path / "a.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match="program '.*a.pt2' (does not exist|cannot be loaded .*torch.export.save)"
    ) as error:
        built(program=path)
    assert "\n" not in str(error.value)
