"""Weights from files of any nesting, and files that are something else."""

import argparse
import collections
import datetime
import decimal
import io
import pathlib
import pickle
import tarfile
import types
import uuid
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from distill.errors import UserError
from distill.networks import WeightsFile, load_weights


def network(width: int = 3) -> nn.Module:
    return nn.Sequential(
        collections.OrderedDict(conv=nn.Conv2d(3, width, 1), norm=nn.BatchNorm2d(width), fc=nn.Linear(width, 2))
    )


def names_and_values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def loaded(content: object, prefix: str | None = None, zipped: bool = True) -> dict[str, torch.Tensor]:
    """What a network holds that was loaded from a file with this content."""
    with TemporaryDirectory() as folder:
        torch.save(content, f"{folder}/a.pth", _use_new_zipfile_serialization=zipped)
        target = network()
        load_weights(target, f"{folder}/a.pth" if prefix is None else WeightsFile(f"{folder}/a.pth", prefix))
    return names_and_values(target)


def nested(state: object, keys: list[str]) -> object:
    for key in reversed(keys):
        state = {key: state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}}
    return state


KEYS = st.one_of(
    st.sampled_from(["model_state_dict", "net", "state_dict", "model", "ema", "state_dict_ema", "weights", "0"]),
    st.text("abcxyz_-. 1é", min_size=1, max_size=6),
)
PREFIXES = st.lists(
    st.sampled_from(["module.", "_orig_mod.", "student.", "model.", "encoder.backbone.", "_fsdp_wrapped_module."]),
    max_size=3,
).map("".join)


@settings(max_examples=30, deadline=None)
@given(keys=st.lists(KEYS, max_size=5), prefix=PREFIXES, beside=st.booleans(), zipped=st.booleans())
def test_weights_are_found_under_any_keys_and_prefix(keys, prefix, beside, zipped):
    state = names_and_values(network())
    stored = {prefix + key: tensor for key, tensor in state.items()}
    if beside and prefix.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", ""):
        stored |= {"heads.kd.weight": torch.ones(3), "n_averaged": torch.tensor(7)}
        stored |= {f"teacher.{key}": tensor for key, tensor in network(5).state_dict().items()}
    assert same(loaded(nested(stored, keys), zipped=zipped), state)


NAMES = st.sampled_from(["student", "teacher", "net", "ema", "model_b", "student.model"])


@settings(max_examples=8, deadline=None)
@given(
    keys=st.lists(KEYS, max_size=3),
    names=st.lists(NAMES, min_size=2, max_size=3, unique=True).filter(
        lambda names: not {"student", "student.model"} <= set(names)
    ),
    wrapper=st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]),
    flat=st.booleans(),
)
def test_of_several_networks_that_fit_the_prefix_chooses_one(keys, names, wrapper, flat):
    states = {name: names_and_values(network()) for name in names}
    if flat:
        content = {f"{wrapper}{name}.{key}": t for name, state in states.items() for key, t in state.items()}
    else:
        content = {name: {wrapper + key: t for key, t in state.items()} for name, state in states.items()}
    keys = [f"{key}!" for key in keys]  # not a network's name
    with pytest.raises(
        UserError, match=rf"holds {len(names)} networks that fit Sequential, under .*prefix: "
    ) as caught:
        loaded(nested(content, keys))
    assert all(repr(".".join([*keys, name]))[1:-1] in str(caught.value).replace("module.", "") for name in names)
    for name, state in states.items():
        for prefix in (name, f"module.{name}", f"{name}."):
            assert same(loaded(nested(content, keys), prefix), state)


def test_the_prefix_in_the_sentence_chooses_one():
    one, other = names_and_values(network()), names_and_values(network())
    content = {"model": {f"module.{side}.{k}": t for side, s in (("a", one), ("b", other)) for k, t in s.items()}}
    with pytest.raises(UserError) as caught:
        loaded(content)
    prefix = str(caught.value).rpartition("prefix: ")[2].rstrip("}")
    assert same(loaded(content, prefix), one) or same(loaded(content, prefix), other)


def test_the_same_weights_twice_are_no_choice():
    state = names_and_values(network())
    assert same(loaded({"model": state, "best": {key: tensor.clone() for key, tensor in state.items()}}), state)


def test_tensors_at_the_top_beside_a_nested_network_have_the_empty_prefix():
    top, ema = names_and_values(network()), names_and_values(network())
    content = {**{f"module.{key}": tensor for key, tensor in top.items()}, "ema": ema}
    with pytest.raises(UserError, match="2 networks"):
        loaded(content)
    assert same(loaded(content, ""), top)
    assert same(loaded(content, "ema"), ema)


@pytest.mark.parametrize(
    ("averaged", "other"),
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("state_dict", "current_model_state")],
)
def test_averaged_weights_of_timm_and_lightning_come_first_with_a_note(averaged, other):
    average, raw = names_and_values(network()), names_and_values(network())
    content = {other: raw, averaged: average}
    with pytest.warns(UserWarning, match=rf"averaged weights under '{averaged}', which are taken.*prefix: {other}"):
        assert same(loaded(content), average)
    assert same(loaded(content, other), raw)


def test_parts_stored_under_keys_of_their_own_make_one_network():
    state = names_and_values(network())
    parts: dict = {"epoch": 1}
    for key, tensor in state.items():
        parts.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = tensor
    assert same(loaded(parts), state)


HARMLESS = {
    "numpy scalars": [np.float64(0.5), np.int64(3), np.bool_(True), np.float32(1), np.str_("a")],
    "numpy arrays": [
        np.arange(3),
        np.zeros((2, 0)),
        np.array(["a", None], dtype=object),
        np.array([(1, 2.0)], "i4,f8"),
    ],
    "numpy types": [np.dtype("f4"), np.float32],
    "paths": [Path("a/b"), pathlib.PureWindowsPath("c:/d")],
    "containers": [collections.defaultdict(list, a=[1]), collections.OrderedDict(a=1), collections.Counter("aab")],
    "queues": [collections.deque([1, 2], maxlen=5), collections.defaultdict(float)],
    "options": [argparse.Namespace(lr=0.1), types.SimpleNamespace(lr=0.1)],
    "torch's": [torch.device("cpu"), torch.float16, torch.Size([2]), torch.torch_version.TorchVersion("2.1")],
    "sets": [{1, 2}, frozenset({1}), range(3), slice(1, 2), 2**70, 1j, b"bytes", bytearray(b"b")],
    "times": [datetime.datetime.now(), datetime.date(2024, 1, 1), datetime.timedelta(1), datetime.UTC],
    "numbers": [decimal.Decimal("1.5"), uuid.UUID(int=3)],
}


@pytest.mark.parametrize("objects", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_objects_beside_weights_are_no_obstacle(objects, zipped):
    state = names_and_values(network())
    assert same(loaded({"model": state, "rest": objects, **{f"{i}": v for i, v in enumerate(objects)}}), state)


def test_names_of_numpy_1_are_read(tmp_path):
    state = names_and_values(network())
    content = io.BytesIO()
    torch.save(
        {"best": np.float64(1), "curve": np.ones(2), "net": state}, content, _use_new_zipfile_serialization=False
    )
    path = tmp_path / "old.pth"
    path.write_bytes(content.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert b"cnumpy.core.multiarray" in path.read_bytes()
    target = network()
    load_weights(target, path)
    assert same(names_and_values(target), state)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_no_code_of_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not loaded for safety"):
        loaded({"model": names_and_values(network()), "callback": Evil()})
    assert not Path("executed").exists()


def test_a_profilers_counters_are_ignored_with_a_note():
    state = names_and_values(network())
    counted = {
        **state,
        "total_ops": torch.zeros(1),
        "conv.total_ops": torch.zeros(1),
        "conv.total_params": torch.ones(1),
    }
    with pytest.warns(UserWarning, match="profiler's counters"):
        assert same(loaded({"model": {k: t for k, t in counted.items() if k != "total_ops"}}), state)


@pytest.mark.parametrize(
    ("value", "called", "dtype"),
    [
        ("nan", "NaN", torch.float32),
        ("inf", "infinity", torch.float16),
        ("-inf", "infinity", torch.bfloat16),
        ("nan", "NaN", torch.float8_e4m3fn),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(value, called, dtype):
    state = names_and_values(network())
    state["fc.weight"][1, 2] = float(value)
    state["fc.weight"] = state["fc.weight"].to(dtype)
    with pytest.raises(UserError, match=f"holds {called} in 'fc.weight' .1 of 6 values"):
        loaded(state)


def test_a_mask_may_hold_the_infinity_that_it_holds_in_a_new_model(tmp_path):
    def masked() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        return model

    source, target = masked(), masked()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert torch.equal(target.weight, source.weight)


def test_the_content_decides_and_not_the_suffix(tmp_path):
    state = names_and_values(network())
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        target = network()
        load_weights(target, tmp_path / name)
        assert same(names_and_values(target), state)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(network().state_dict(), tmp_path / "a.pth")
    load_weights(network(), "~/a.pth")


def cut(path: Path, write) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-200])


def packed(path: Path, kind: str) -> None:
    inner = path.with_name("inner.pth")
    torch.save(network().state_dict(), inner)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, "inner.pth")
    else:
        with tarfile.open(path, f"w:{kind}") as archive:
            archive.add(inner, "inner.pth")


def program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def mixed(path: Path) -> None:
    torch.save({"model": {"encoder.a": torch.ones(1)}, "optimizer": {"momentum": torch.ones(2)}}, path)


KINDS = {
    "a Git LFS pointer .* `git lfs pull`": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    ),
    "an HTML page": lambda path: path.write_text("\n<!DOCTYPE html>\n<html lang=en><title>Sign in</title>"),
    "an XML document": lambda path: path.write_text("<?xml version='1.0'?><Error>AccessDenied</Error>"),
    "a JSON document": lambda path: path.write_text('{"error": "Invalid credentials"}'),
    "the index of weights in several files": lambda path: path.write_text('{"weight_map": {"a": "b.safetensors"}}'),
    "text that begins 'learning_rate: 0.1'": lambda path: path.write_text("learning_rate: 0.1\nepochs: 3\n"),
    "a TorchScript archive, .* torch.jit.load": lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
    "a torch.export archive, .* torch.export.load": program,
    "a zip archive of other files .'inner.pth'.: unpack": lambda path: packed(path, "zip"),
    "compressed by gzip": lambda path: packed(path, "gz"),
    "compressed by xz": lambda path: packed(path, "xz"),
    "a tar archive": lambda path: packed(path, ""),
    "a NumPy archive": lambda path: np.savez(path.open("wb"), a=np.ones(2)),
    "a NumPy array": lambda path: np.save(path.open("wb"), np.ones(2)),
    "a PNG image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)),
    "a pickle that torch.save did not write": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "a pickle protocol other than torch's": lambda path: torch.save({"a": torch.ones(1)}, path, pickle_protocol=4),
    "truncated or not .* without its end": lambda path: cut(path, lambda p: torch.save({"a": torch.ones(99)}, p)),
    "truncated or damaged safetensors": lambda path: cut(path, lambda p: save_file({"a": torch.ones(99)}, p)),
    "truncated or not a file of weights": lambda path: path.write_bytes(bytes(range(128, 256)) * 9),
    "is empty": lambda path: path.touch(),
    "is a folder": lambda path: path.mkdir(),
    "contains no named tensors; its keys are 'epoch', 'args'": lambda path: torch.save({"epoch": 1, "args": {}}, path),
    "none of its tensors .'model.encoder.a'.*; its tensors lie under 'model', 'optimizer'": mixed,
}


SLOW = [sentence for sentence in KINDS if "torch.export" in sentence]


@pytest.mark.parametrize(
    "sentence", [pytest.param(sentence, marks=[pytest.mark.slow] * (sentence in SLOW)) for sentence in KINDS]
)
@pytest.mark.parametrize("suffix", [".pth", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_another_file_is_named_as_what_it_is(sentence, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    KINDS[sentence](path)
    with pytest.raises(UserError, match=sentence) as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_told_with_the_files_in_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a folder: give a file in it, such as 'model.safetensors'"):
        load_weights(network(), tmp_path)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("https://a.org/b.pth", "is an address: download"),
        ("/dev/null", "is not a regular file"),
        ("a", "does not exist"),
    ],
)
def test_what_is_no_file_is_told(path, sentence):
    with pytest.raises(UserError, match=sentence):
        load_weights(network(), path)


def test_a_prefix_that_is_not_there_is_named_with_near_matches(tmp_path):
    with pytest.raises(
        UserError, match="weights.prefix: no tensor's name begins with 'techer': did you mean 'teacher'"
    ):
        loaded({"teacher": names_and_values(network())}, "techer")
    with pytest.raises(UserError, match="only in part: .*'conv.weight' is"):
        loaded({"teacher": names_and_values(network(5)), "student": names_and_values(network())}, "teacher")
