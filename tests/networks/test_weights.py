"""Weights from files of many makes."""

import argparse
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from distill.errors import UserError
from distill.networks import Timm, load_weights

NAME = "test_resnet"


def model(num_classes: int = 5, name: str = NAME, **options) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes, **options)


def same(one: nn.Module, other: nn.Module, but: str = "nothing") -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in one.state_dict().items() if but not in key)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "timm's trainer": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "averaged first": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state},
    "DDP": lambda state: {"state_dict": prefixed(state, "module.")},
    "compiled under DDP": lambda state: prefixed(state, "module._orig_mod."),
    "compiled inside": lambda state: prefixed(state, "student.model._orig_mod."),
    "Lightning": lambda state: {
        "state_dict": {**prefixed(state, "student.model."), "heads.kd.weight": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "hyper_parameters": {"lr": 0.1},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_a_file(wrapping, tmp_path):
    source, target = model(), model()
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt", classifier=["fc"])
    assert same(target, source)


def test_safetensors_are_read(tmp_path):
    source, target = model(), model()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_weights(target, str(tmp_path / "weights.safetensors"))
    assert same(target, source)


def test_a_submodule_called_module_keeps_its_name(tmp_path):
    source, target = nn.ModuleDict({"module": nn.Linear(2, 2)}), nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    assert same(target, source)


def test_files_from_before_batches_were_counted_are_read(tmp_path):
    source, target = model(), model()
    state = {key: tensor for key, tensor in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    assert same(target, source)


def test_torchvision_names_are_converted_where_timm_knows_how(tmp_path):
    source, target = model(name="densenet121"), model(name="densenet121")
    renamed = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", key): tensor
        for key, tensor in source.state_dict().items()
        if "num_batches" not in key
    }
    torch.save(renamed, tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt", classifier=["classifier"])
    assert same(target, source)


class Renamed(nn.Linear):
    """A model that can convert the names of older checkpoints."""

    def convert_checkpoint(self, state):
        return {key.removeprefix("old_"): tensor for key, tensor in state.items()}


def test_a_model_may_convert_checkpoints_itself(tmp_path):
    source, target = Renamed(2, 2), Renamed(2, 2)
    torch.save(prefixed(source.state_dict(), "old_"), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    assert same(target, source)


@pytest.mark.parametrize(
    ("name", "converts"), [("_filter_fn", True), ("checkpoint_filter_fn", True), ("prefilter", False)]
)
def test_only_functions_of_timms_names_convert(name, converts, tmp_path, monkeypatch):
    def function(state):
        return {key.removeprefix("old_"): tensor for key, tensor in state.items()}

    monkeypatch.setitem(globals(), name, function)
    kind = type("Filtered", (nn.Linear,), {"__module__": __name__})
    torch.save(prefixed(kind(2, 2).state_dict(), "old_"), tmp_path / "weights.pt")
    with nullcontext() if converts else pytest.raises(UserError, match="has no weights of Filtered"):
        load_weights(kind(2, 2), tmp_path / "weights.pt")


def test_position_embeddings_are_resized_by_timm(tmp_path):
    source = model(name="test_vit3", img_size=96)
    target = model(name="test_vit3", img_size=48)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt", classifier=["head"])
    assert same(target, source, but="pos_embed")


@pytest.mark.parametrize(
    ("name", "classifiers"), [(NAME, ["fc"]), ("deit_tiny_distilled_patch16_224", ["head", "head_dist"])]
)
def test_only_the_classifier_is_left_out(name, classifiers, tmp_path):
    source = model(7, name)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    network = Timm(name, weights=tmp_path / "weights.pt", drop_classifier=True)
    network.build(5, (3, 224, 224))
    left = [key for key, tensor in source.state_dict().items() if not equal(tensor, network.model.state_dict()[key])]
    assert {key.split(".")[0] for key in left} == set(classifiers)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def test_a_file_without_a_classifier_is_taken_if_told_so(tmp_path):
    source, target = model(0), model()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="has no classifier .*'fc.bias', 'fc.weight'.* set drop_classifier: true"):
        load_weights(target, tmp_path / "weights.pt", classifier=["fc"])
    load_weights(target, tmp_path / "weights.pt", drop_classifier=True, classifier=["fc"])
    assert same(source, target)


def missing(path: Path) -> None:
    pass


def truncated(path: Path) -> None:
    torch.save(model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def garbage(path: Path) -> None:
    path.write_text("<html>not found</html>")


def empty(path: Path) -> None:
    path.touch()


class Anything:
    """A class of the training program."""


def objects(path: Path) -> None:
    torch.save({"model": model().state_dict(), "tracker": Anything()}, path)


def no_tensors(path: Path) -> None:
    torch.save([1, 2], path)


def foreign(path: Path) -> None:
    torch.save({"encoder.a": torch.ones(1), "encoder.b": torch.ones(1)}, path)


def partly(path: Path) -> None:
    state = model().state_dict()
    del state["conv1.0.weight"]
    torch.save({**state, "extra.weight": torch.ones(1)}, path)


def other_width(path: Path) -> None:
    state = model().state_dict()
    torch.save({**state, "conv1.0.weight": torch.ones(4, 3, 3, 3)}, path)


def other_count(path: Path) -> None:
    torch.save(model(1000).state_dict(), path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (missing, "does not exist"),
        (truncated, "cannot be read: it is truncated or not a file of weights"),
        (garbage, "cannot be read: it is an HTML page"),
        (empty, "cannot be read: it is empty"),
        (objects, "besides tensors it contains '.*Anything', which are not loaded for safety: save the state dict"),
        (no_tensors, "contains no named tensors, but list"),
        (foreign, "has no weights of ResNet: none of its tensors .'encoder.a', 'encoder.b'. has a matching name"),
        (partly, "only in part: .* 1 are missing .'conv1.0.weight'.; 1 are unexpected .'extra.weight'."),
        (other_width, r"only in part: .*'conv1.0.weight' is \[4, 3, 3, 3\], not \["),
        (other_count, "has 1000 classes, but the network has 5: set drop_classifier: true"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_does_not_fit_is_one_sentence_and_loads_nothing(make, sentence, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors" and make not in (missing, garbage, empty):
        return
    make(path)
    target = model()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(UserError, match=sentence) as caught:
        load_weights(target, path, classifier=["fc"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())
