"""The index of a store: what is written is read, what is broken is said, and every difference has its sentence."""

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import UserError
from distill.store import (
    MISSING,
    Difference,
    Quantity,
    Rows,
    StoreIndex,
    differences,
    read_state,
    room,
    write_state,
)
from distill.store.index import FORMAT, NOT_IN_KEY
from tests.store.sample_stores import files, files_of_at_most

IDENTITY = {
    "teacher": {"fingerprint": "3fa1c0", "dtype": "float32"},
    "data": {"image_size": 96, "mean": (0.5, 0.5, 0.5), "samples": ["ab", "cd"]},
    "versions": {"torch": "2.15.0"},
}
EMBEDDING = Quantity("embedding", (384,), torch.float32)
GRAM = Quantity("SeRKD.gram.3fa1c0", (49, 49), torch.bfloat16, {"grid": (7, 7), "slic": {"compactness": 10.0}})
INDEX = StoreIndex(
    IDENTITY,
    {"train": Rows(50_000, 4, 8192), "val": Rows(1000, 1, 8192)},
    {"embedding": EMBEDDING, GRAM.name: GRAM},
    {"train": ["embedding", GRAM.name], "val": ["embedding"]},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


def test_an_index_is_read_as_it_was_written(tmp_path):
    INDEX.write(tmp_path / "new/store")
    again = StoreIndex.read(tmp_path / "new/store")
    assert again == INDEX
    assert again.key == INDEX.key
    assert len(INDEX.key) == 16
    assert again.quantities_of("val") == [EMBEDDING]
    assert again.quantities_of("train") == [EMBEDDING, GRAM]
    assert '\n      "image_size": 96,\n' in (tmp_path / "new/store/index.json").read_text()


def test_an_index_of_no_contents_has_all_quantities_in_each_split():
    index = StoreIndex({}, INDEX.splits, INDEX.quantities)
    assert index.quantities_of("val") == index.quantities_of("train") == [EMBEDDING, GRAM]
    with pytest.raises(UserError, match="split cannot be 'tset': "):
        index.quantities_of("tset")


@given(MAPPINGS, MAPPINGS)
@settings(deadline=None, max_examples=40)
def test_two_identities_have_one_key_exactly_if_they_have_no_difference(first, second):
    index = StoreIndex(first, {}, {})
    for other in (second, {**first, **second}, first):
        assert (index.key == StoreIndex(other, {}, {}).key) == (index.differences(other) == [])
        assert (index.differences(other) == []) == (differences(first, other) == [])


@given(MAPPINGS)
@settings(deadline=None, max_examples=10)
def test_any_identity_keeps_its_key_on_disk(tmp_path_factory, identity):
    folder = tmp_path_factory.mktemp("index")
    index = StoreIndex(identity, {}, {})
    index.write(folder)
    again = StoreIndex.read(folder)
    assert again.key == index.key
    assert again.differences(identity) == []
    assert list(again.identity) == list(identity)


def test_the_key_does_not_depend_on_order_versions_or_the_writing_of_numbers():
    reordered = {
        "data": {"samples": ["ab", "cd"], "mean": [0.5, 0.5, 0.5], "image_size": 96.0},
        "teacher": IDENTITY["teacher"],
        "versions": {"torch": "2.16.0"},
        "command": "distill store",
    }
    assert {"versions", "command", "taps", "network", "device"} == set(NOT_IN_KEY)
    assert StoreIndex(reordered, {}, {}).key == INDEX.key
    assert INDEX.differences(reordered) == []
    assert StoreIndex({**IDENTITY, "data": {"image_size": True}}, {}, {}).key != INDEX.key


def test_each_difference_has_its_sentence_in_a_stable_order():
    stored = {
        "teacher": {"fingerprint": "3fa1c0"},
        "data": {
            "image_size": 96,
            "mean": [0.5, 0.5],
            "labels": list(range(50)),
            "transform": [{"size": 8}, {"p": 0.5}],
        },
        "seed": 0,
        "mixing": {"alpha": 0.2, "kind": "cutmix"},
    }
    given = {
        "seed": False,
        "data": {
            "image_size": 128,
            "mean": [0.5, 0.4],
            "labels": [*range(49), 7],
            "transform": [{"size": 8}, {"p": 0.1}],
            "names": list(range(100)),
        },
        "teacher": {"fingerprint": None},
        "draws": 4,
    }
    found = differences(stored, given)
    assert found[0] == Difference("teacher.fingerprint", "3fa1c0", None)
    assert found[-1] == Difference("draws", MISSING, 4)
    assert [str(difference) for difference in found] == [
        "teacher.fingerprint is '3fa1c0' in the store, but None here",
        "data.image_size is 96 in the store, but 128 here",
        "data.mean is [0.5, 0.5] in the store, but [0.5, 0.4] here",
        "data.labels.49 is 49 in the store, but 7 here",
        "data.transform.1.p is 0.5 in the store, but 0.1 here",
        "data.names is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16... (100 items) here, but missing in "
        "the store",
        "seed is 0 in the store, but False here",
        "mixing.alpha is 0.2 in the store, but missing here",
        "mixing.kind is 'cutmix' in the store, but missing here",
        "draws is 4 here, but missing in the store",
    ]


@given(MAPPINGS, MAPPINGS)
@settings(deadline=None, max_examples=40)
def test_differences_turned_around_are_those_of_the_other_side(first, second):
    there = {(found.key, repr(found.stored), repr(found.given)) for found in differences(first, second)}
    back = {(found.key, repr(found.given), repr(found.stored)) for found in differences(second, first)}
    assert there == back


def test_draws_quantities_and_splits_are_added_and_nothing_else_changes(tmp_path):
    logits = Quantity("logits", (10,), torch.float32)
    larger = INDEX.adding("train", Rows(50_000, 8, 8192), [logits, EMBEDDING]).adding("test", Rows(7, 1, 8), [GRAM])
    larger.write(tmp_path)
    again = StoreIndex.read(tmp_path)
    assert again.key == INDEX.key
    assert again.splits == {**INDEX.splits, "train": Rows(50_000, 8, 8192), "test": Rows(7, 1, 8)}
    assert again.quantities_of("train") == [EMBEDDING, GRAM, logits]
    assert again.quantities_of("val") == [EMBEDDING]
    assert again.quantities_of("test") == [GRAM]
    assert INDEX.adding("train", Rows(50_000, 1, 8192), []) == INDEX


@pytest.mark.parametrize(
    ("rows", "quantity", "message"),
    [
        (Rows(49_999, 4, 8192), EMBEDDING, "images of 'train' is 50000 in the store, but 49999 here"),
        (Rows(50_000, 4, 64), EMBEDDING, "per_shard of 'train' is 8192 in the store, but 64 here"),
        (
            INDEX.splits["train"],
            Quantity("embedding", (768,), torch.float16, {"layer": 3}),
            r"quantity 'embedding' is another one in the store \(shape is \[384\] in the store, but \[768\] here; "
            r"dtype is 'float32' in the store, but 'float16' here; key.layer is 3 here, but missing in the store\)",
        ),
        (
            INDEX.splits["train"],
            Quantity("Embedding", (384,), torch.float32),
            "beside 'embedding': some systems ignore case",
        ),
    ],
)
def test_what_does_not_fit_the_store_is_not_added(rows, quantity, message):
    with pytest.raises(UserError, match=message):
        INDEX.adding("train", rows, [quantity])


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "ä", "a.", "-a", "NUL", "com1.gram", "a:b", "a" * 101, "a\n"],
)
def test_a_name_that_some_system_refuses_for_a_folder_is_refused(name):
    with pytest.raises(UserError, match="a quantity's name must be a folder's name on any system"):
        Quantity(name, (1,), torch.float32)
    with pytest.raises(UserError, match="a split's name must be a folder's name on any system"):
        StoreIndex({}, {name: Rows(1, 1, 1)}, {})


@pytest.mark.parametrize("name", ["state", "index.json", "State"])
def test_a_split_has_no_name_of_the_stores_own(name):
    with pytest.raises(UserError, match="a split cannot be named '"):
        StoreIndex({}, {name: Rows(1, 1, 1)}, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantity("a", (0,), torch.float32), r"'a' must have sizes of at least 1, given \(0,\)"),
        (lambda: Quantity("a", (1,), torch.int64), "'a' cannot be stored as torch.int64: choose float32, "),
        (lambda: Quantity("a", (1,), torch.float32, {"b": {1}}), "the key of quantity 'a' must be made of JSON values"),
        (lambda: StoreIndex({"a": torch.float32}, {}, {}), "the identity of a store must be made of JSON values"),
        (lambda: StoreIndex({}, {"train": Rows(1, 1, 1)}, {}, {"train": ["a"]}), "name its quantities"),
        (lambda: Rows(0, 1, 1), "images must be at least 1, given 0"),
        (lambda: Rows(1, True, 1), "draws must be an integer, given True"),
        (lambda: Rows(1, 1, 2.0), "per_shard must be an integer, given 2.0"),
    ],
)
def test_impossible_rows_quantities_and_identities_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_quantity_knows_its_bytes():
    assert [EMBEDDING.bytes, GRAM.bytes, Quantity("loss", (), torch.float64).bytes] == [1536, 4802, 8]


def broken(**changes):
    def text(good):
        return json.dumps({name: value for name, value in {**good, **changes}.items() if value is not ...})

    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda good: json.dumps(good)[:100], "has a damaged index.json"),
        (lambda good: "", "has a damaged index.json"),
        (lambda good: "[" * 100_000, "has a damaged index.json"),
        (lambda good: "[]", "has a damaged index.json"),
        (lambda good: '"\udcff"', "has a damaged index.json"),
        (broken(format=FORMAT + 1), f"has format {FORMAT + 1}, and this version reads {FORMAT}: update distill"),
        (broken(format="1"), "has a damaged index.json .its format is '1'"),
        (broken(format=...), "has a damaged index.json .KeyError: 'format'"),
        (broken(splits=...), "has a damaged index.json"),
        (broken(splits={"train": {"images": 1, "draws": 1, "per_shard": 1}}), "has a damaged index.json"),
        (
            broken(splits={"train": {"images": "1", "draws": 1, "per_shard": 1, "quantities": []}}),
            "images must be an int",
        ),
        (broken(splits={"train": 3}), "has a damaged index.json"),
        (broken(quantities={"embedding": {"shape": [1], "dtype": "int8", "key": {}}}), "dtype cannot be 'int8'"),
        (broken(quantities={}), "name its quantities"),
        (broken(quantities=[1]), "has a damaged index.json"),
        (broken(identity=3), "has a damaged index.json"),
    ],
)
def test_a_damaged_index_is_refused_in_one_sentence(text, message, tmp_path):
    INDEX.write(tmp_path)
    good = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(text(good), errors="surrogateescape")
    with pytest.raises(UserError, match=message) as error:
        StoreIndex.read(tmp_path)
    assert str(error.value).startswith(f"store {str(tmp_path)!r} ")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder/index.json").mkdir(parents=True)
    for name, message in {
        "none": "does not exist",
        "file": "is not a folder",
        ".": "has no index.json, which `distill store` writes first: it is another folder",
        "folder": r"cannot be read \(Is a directory\)",
    }.items():
        with pytest.raises(UserError, match=f"store '.*' {message}"):
            StoreIndex.read(tmp_path / name)


def test_a_full_disk_keeps_the_old_index(tmp_path):
    INDEX.write(tmp_path)
    before = files(tmp_path)
    larger = StoreIndex({"names": ["a"] * 5000}, {}, {})
    with (
        files_of_at_most(10_000),
        pytest.raises(UserError, match=r"index.json' .* cannot be written \(File too large\)"),
    ):
        larger.write(tmp_path)
    assert files(tmp_path) == before


def test_frozen_tensors_are_read_as_they_were_written_even_if_they_share_memory(tmp_path):
    weight = torch.randn(3, 4)
    write_state(tmp_path, "RRD.3fa1c0", {"weight": weight.T, "row": weight[1], "half": weight.half()})
    again = read_state(tmp_path, "RRD.3fa1c0")
    assert set(again) == {"weight", "row", "half"}
    assert torch.equal(again["weight"], weight.T)
    assert torch.equal(again["row"], weight[1])
    assert again["half"].dtype == torch.float16
    file = tmp_path / "state/RRD.3fa1c0.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(
        UserError, match=r"'state/RRD.3fa1c0.safetensors' is cut short or damaged; `distill store` writes"
    ):
        read_state(tmp_path, "RRD.3fa1c0")
    with pytest.raises(UserError, match="is missing"):
        read_state(tmp_path, "RRD.other")


def test_files_have_ordinary_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        INDEX.write(tmp_path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "index.json").stat().st_mode) == 0o640


def test_room_is_that_of_the_disk_that_will_hold_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    for folder in (tmp_path, tmp_path / "not/yet/there", Path("relative/folder")):
        assert math.isclose(room(folder), free, rel_tol=0.01)
    assert not (tmp_path / "not").exists()
    if os.path.isdir("/dev/shm"):
        shared = os.statvfs("/dev/shm")
        assert math.isclose(room("/dev/shm/not/there"), shared.f_bavail * shared.f_frsize, rel_tol=0.01)
