"""Folders of images without labels, with lists of labels, and with validation images held out."""

import csv
import os
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distill.__main__ import main
from distill.data import ExponentialTail, ImageFolder, Mixing
from distill.data.held_out import divide
from distill.data.label_lists import read_label_list
from distill.data.mixing import mix
from distill.errors import UserError
from tests.program import TINY


def write(root, *names, level=128):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(path)


def folder(root, **settings):
    return ImageFolder(str(root), **{"image_size": 8, "batch_size": 2, "num_workers": 0, **settings})


def labels(data, split):
    """The label of each file of a split, by its path."""
    source = data.samples(split).source
    names = [os.path.relpath(path, data.root) for path in source.paths]
    return dict(zip(names, source.labels, strict=True))


FLAT = [f"{number}.png" for number in range(40)]
NESTED = [f"{'abc'[number % 3]}/{number % 2}/{number}.png" for number in range(40)]


@pytest.mark.parametrize("names", [FLAT, NESTED])
@pytest.mark.parametrize("word", ["none", None])
def test_a_folder_without_labels_is_read_and_some_images_are_held_out(names, word, tmp_path):
    write(tmp_path, *names)
    write(tmp_path, ".hidden/0.png", ".1.png")
    data = folder(tmp_path, labels=word, val_fraction=0.3)
    assert (data.num_classes, data.classes, data.class_counts()) == (0, None, [])
    training, held_out = labels(data, "train"), labels(data, "val")
    assert labels(data, "test") == held_out
    assert not training.keys() & held_out.keys()
    assert training.keys() | held_out.keys() == set(names)
    assert 3 <= len(held_out) <= 21, "about 12"
    assert {*training.values(), *held_out.values()} == {-1}
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [-1, -1]
    assert batch["image"].shape == (2, 3, 8, 8)


def test_folders_of_splits_without_labels_are_read_at_any_depth(tmp_path):
    write(tmp_path, "train/0.png", "train/a/b/1.png", "val/2.png", "test/c/3.png")
    data = folder(tmp_path, labels="none")
    assert {split: list(labels(data, split)) for split in ("train", "val", "test")} == {
        "train": ["train/0.png", "train/a/b/1.png"],
        "val": ["val/2.png"],
        "test": ["test/c/3.png"],
    }


def test_class_folders_need_no_folder_for_training_if_some_are_held_out(tmp_path):
    write(tmp_path, *(f"{name}/{number}.png" for name in ("dog", "cat") for number in range(20)))
    data = folder(tmp_path, val_fraction=0.2)
    assert data.classes == ["cat", "dog"]
    for split in ("train", "val"):
        assert labels(data, split).items() == {name: int("dog" in name) for name in labels(data, split)}.items()
    with pytest.raises(UserError, match="has no validation images 'val': add them, or give data.val_fraction"):
        folder(tmp_path)


def test_the_same_images_are_held_out_wherever_they_lie_and_whatever_is_added(tmp_path):
    names = [f"cat/{number}.png" for number in range(30)]
    write(tmp_path / "flat", *names)
    write(tmp_path / "split/train", *names, "cat/more.png", "dog/0.png", "dog/1.png")
    first = labels(folder(tmp_path / "flat", labels="none", val_fraction=0.25), "val").keys()
    other = labels(folder(tmp_path / "split", val_fraction=0.25), "val").keys()
    assert first == {name.removeprefix("train/") for name in other} & set(names)


@given(st.sets(st.text(max_size=8), min_size=60, max_size=80), st.floats(0.3, 0.7), st.floats(0.01, 0.2))
def test_an_image_is_held_out_by_its_key_alone(keys, fraction, more):
    keys = sorted(keys)
    training, held_out = divide(keys, fraction)
    assert sorted([*training, *held_out]) == list(range(len(keys)))
    chosen = {keys[position] for position in held_out}
    _, of_fewer = divide(keys[20:], fraction)
    assert {keys[20:][position] for position in of_fewer} == chosen & set(keys[20:])
    _, of_more = divide(keys[::-1], fraction + more)
    assert chosen <= {keys[::-1][position] for position in of_more}


def test_the_share_held_out_is_the_fraction_in_any_process():
    keys = [f"n{number % 100:03}/{number}.JPEG" for number in range(20_000)]
    held_out = divide(keys, 0.1)[1]
    assert abs(len(held_out) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    digests = [sha256(repr(("validation", key)).encode()).hexdigest() for key in keys]
    assert held_out == [number for number, digest in enumerate(digests) if int(digest, 16) < 0.1 * 2**256]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction, tmp_path):
    write(tmp_path, *FLAT)
    with pytest.raises(UserError, match=f"data.val_fraction must be above 0 and below 1, given {fraction}"):
        folder(tmp_path, labels="none", val_fraction=fraction)


@pytest.mark.parametrize(
    ("fraction", "words"), [(1e-9, "holds out none of the 40.*more"), (1 - 1e-9, "all of the.*less")]
)
def test_a_fraction_that_leaves_nothing_is_refused(fraction, words, tmp_path):
    write(tmp_path, *FLAT)
    with pytest.raises(UserError, match=words):
        folder(tmp_path, labels="none", val_fraction=fraction).setup("fit")


def test_a_fraction_beside_validation_images_is_refused(tmp_path):
    write(tmp_path, "train/a/0.png", "val/a/0.png")
    for word in ("folders", "none"):
        with pytest.raises(UserError, match=r"data.val_fraction 0.1 would hold out .* leave one of them out"):
            folder(tmp_path, labels=word, val_fraction=0.1)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="data.root: there is no folder .*nowhere"):
        folder(tmp_path / "nowhere", labels="none", val_fraction=0.1)
    write(tmp_path, "val/0.png", "images/1.png")
    with pytest.raises(UserError, match="has a folder 'val' but none named 'train'"):
        folder(tmp_path, labels="none", val_fraction=0.1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"/train has no image, only files of other kinds \(.heic\)"):
        folder(tmp_path, labels="none").setup("fit")
    with pytest.raises(UserError, match=r"no class folders in .*train.* give data.labels=none to train without labels"):
        folder(tmp_path)
    with pytest.raises(UserError, match="there is no list 'folder'; besides lists, did you mean 'folders'"):
        folder(tmp_path, labels="folder")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_balanced": True}, "data.class_balanced needs labels, but the images have none"),
        ({"longtail": ExponentialTail()}, "data.longtail: ExponentialTail needs labels, but the data have none"),
        ({"labeled_only": True}, "data.labeled_only leaves out all images"),
    ],
)
def test_what_needs_labels_is_refused_without(settings, words, tmp_path):
    write(tmp_path, *FLAT)
    with pytest.raises(UserError, match=words):
        folder(tmp_path, labels="none", val_fraction=0.1, **settings).setup("fit")


def test_images_without_labels_are_mixed():
    images = torch.rand(4, 3, 8, 8)
    batch = {"image": images, "label": torch.full((4,), -1)}
    mixed = mix(batch, 0, Mixing(mixup=1.0), seed=1)
    assert mixed["label"].tolist() == [-1] * 4
    assert torch.equal(mixed["image"], mix({**batch, "label": torch.zeros(4).long()}, 3, Mixing(mixup=1.0), 1)["image"])
    assert not torch.equal(mixed["image"], images)


LISTS = {
    "comma": "a/0.png,cat\na/1.png,dog\nb 2.png,cat\n",
    "header": "path,label\na/0.png,cat\na/1.png,dog\nb 2.png,cat\n",
    "any header": "Image Name,Class\na/0.png,cat\na/1.png,dog\nb 2.png,cat\n",
    "columns": "id,label,path,split\n7,cat,a/0.png,x\n8,dog,a/1.png,x\n9,cat,b 2.png,y\n",
    "semicolon": "a/0.png;cat\na/1.png;dog\nb 2.png;cat\n",
    "tab": "a/0.png\tcat\na/1.png\tdog\nb 2.png\tcat\n",
    "spaces": "a/0.png  cat\n\n  a/1.png dog\nb 2.png cat",
    "quotes": '"a/0.png", "cat"\n"./a/1.png", dog\n"b 2.png",cat\n',
    "signature and returns": "\ufeffa/0.png,cat\r\na/1.png,dog\r\nb 2.png,cat\r\n",
    "twice": "a/0.png,cat\na/1.png,dog\nb 2.png,cat\na/../a/0.png,cat\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_many_forms_are_read(name, tmp_path):
    (tmp_path / "list").write_text(LISTS[name], newline="")
    assert read_label_list(str(tmp_path / "list")) == {"a/0.png": "cat", "a/1.png": "dog", "b 2.png": "cat"}


def test_images_without_a_label_are_listed_in_several_ways(tmp_path):
    for number, content in enumerate(["0.png,\n1 a.png\n2.png,-1\n3.png,5\n", "0.png\n1 a.png\n2.png -1\n3.png 5"]):
        path = tmp_path / str(number)
        path.write_text(content)
        assert read_label_list(str(path)) == {"0.png": "", "1 a.png": "", "2.png": "", "3.png": "5"}


@given(
    st.dictionaries(
        st.from_regex(r"[^\s/][ -~é]{0,8}\.png", fullmatch=True), st.text("ab ,;\"'", min_size=1), min_size=1
    )
)
def test_a_list_that_was_written_as_csv_is_read_back(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("lists") / "list.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("path", "label"), *rows.items()])
    expected = {os.path.normpath(path): label.strip() for path, label in rows.items()}
    assert read_label_list(str(file)) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty: give lines 'path,label'"),
        ("path,label\n", "lists no image"),
        ("0.png,cat\n1.png,dog,3\n", "line 2 of .* is not 'path,label': '1.png,dog,3'; of more columns"),
        ("0.png,cat\n,dog\n", "line 2 of .* is not 'path,label'"),
        ("0.png,cat\n0.png,dog\n", "line 2 of .* gives 0.png the label 'dog', but an earlier line 'cat'"),
    ],
)
def test_lists_of_another_form_are_refused(content, words, tmp_path):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_label_list(str(tmp_path / "list.csv"))
    assert "\n" not in str(caught.value)


def test_a_list_labels_some_images_and_the_others_have_none(tmp_path):
    write(tmp_path / "images", *FLAT)
    listed = {name: ("dog", "cat")[number % 2] for number, name in enumerate(FLAT[:30])}
    (tmp_path / "list.csv").write_text("".join(f"{name},{label}\n" for name, label in listed.items()))
    data = folder(tmp_path / "images", labels=str(tmp_path / "list.csv"), val_fraction=0.2)
    assert data.classes == ["cat", "dog"]
    found = labels(data, "train") | labels(data, "val")
    assert found == {name: {"cat": 0, "dog": 1}.get(listed.get(name), -1) for name in FLAT}
    assert sum(data.class_counts()) == sum(label >= 0 for label in labels(data, "train").values())
    assert any("images without a label in" in note and note.endswith(": 10") for note in data.notes), data.notes
    only = folder(tmp_path / "images", labels=str(tmp_path / "list.csv"), val_fraction=0.2, labeled_only=True)
    for split in ("train", "val"):
        assert labels(only, split) == {name: label for name, label in labels(data, split).items() if label >= 0}


def test_a_list_covers_the_folders_of_all_splits(tmp_path):
    write(tmp_path, "train/x/0.png", "train/1.png", "train/2.png", "val/3.png", "other/4.png")
    file = tmp_path / "list.txt"
    file.write_text(f"train/x/0.png 2\ntrain/1.png 0\nval/3.png 2\nother/4.png 1\n{tmp_path}/train/2.png 1\n")
    data = folder(tmp_path, labels=str(file))
    assert (data.num_classes, data.classes) == (3, None)
    assert labels(data, "train") == {"train/1.png": 0, "train/2.png": 1, "train/x/0.png": 2}
    assert labels(data, "val") == {"val/3.png": 2}
    assert "images that are in none of the folders of the splits: 1" in data.samples("train").source.notes[-1]
    file.write_text("train/1.png cat\nval/3.png cot\n")
    with pytest.raises(UserError, match=r"no training image has the label 'cot' .*did you mean 'cat'"):
        folder(tmp_path, labels=str(file))
    file.write_text("train/1.png 0\nval/3.png 4\n")
    with pytest.raises(UserError, match="image 0 of val has label 4, but with 1 classes"):
        folder(tmp_path, labels=str(file)).used_source("val")


def test_lists_by_split_name_the_images_themselves(tmp_path):
    write(tmp_path, *FLAT)
    lists = {}
    for split, numbers in (("train", range(10)), ("val", range(10, 14)), ("test", range(14, 16))):
        lists[split] = str(tmp_path / f"{split}.csv")
        (tmp_path / f"{split}.csv").write_text("".join(f"{number}.png,{'ab'[number % 2]}\n" for number in numbers))
    data = folder(tmp_path, labels=lists)
    assert data.classes == ["a", "b"]
    assert labels(data, "train") == {f"{number}.png": number % 2 for number in range(10)}
    assert labels(data, "val") == {f"{number}.png": number % 2 for number in range(10, 14)}
    assert labels(data, "test") == {"14.png": 0, "15.png": 1}
    with pytest.raises(UserError, match="data.labels has a list for val, but none for train"):
        folder(tmp_path, labels={"val": lists["val"]})
    with pytest.raises(UserError, match="data.labels cannot be 'valid'"):
        folder(tmp_path, labels={"train": lists["train"], "valid": lists["val"]})
    held_out = folder(tmp_path, labels={"train": lists["train"]}, val_fraction=0.4)
    assert labels(held_out, "train") | labels(held_out, "val") == labels(data, "train")


@pytest.mark.parametrize("by_split", [False, True])
def test_missing_images_of_a_list_are_counted_and_the_first_is_named(by_split, tmp_path):
    write(tmp_path / "images", "0.png", "1.png")
    file = tmp_path / "list.csv"
    file.write_text("0.png,a\nz.png,a\n1.png,a\nb.png,a\n")
    list_of = {"train": str(file)} if by_split else str(file)
    with pytest.raises(
        UserError, match=r"2 of the images that '.*list.csv' lists are missing, first z.png: paths are rel"
    ):
        folder(tmp_path / "images", labels=list_of, val_fraction=0.5).setup("fit")


def test_a_list_of_other_paths_or_without_a_label_is_refused(tmp_path):
    write(tmp_path / "data", "train/0.png", "val/1.png")
    (tmp_path / "list.csv").write_text("0.png,a\n")
    with pytest.raises(UserError, match=r"lists no image of .*train \(its first is 0.png\): paths are relative to"):
        folder(tmp_path / "data", labels=str(tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_text("train/0.png,\n")
    with pytest.raises(UserError, match="no training image has a label: give data.labels=none"):
        folder(tmp_path / "data", labels=str(tmp_path / "list.csv"))


def test_a_class_that_is_held_out_as_a_whole_is_told(tmp_path):
    write(tmp_path, *(f"a/{number}.png" for number in range(30)))
    alone = [name for name in (f"b{number}/0.png" for number in range(30)) if divide([*FLAT, name], 0.4)[1][-1] == 40]
    write(tmp_path, alone[0])
    notes = folder(tmp_path, val_fraction=0.4).samples("train").source.notes
    assert "there is no training image of 1 of the 2 classes" in notes[-1]


def test_a_list_trains_from_the_command_line(tmp_path):
    write(tmp_path / "images", *FLAT)
    (tmp_path / "list.csv").write_text("".join(f"{name},{'ab'[number % 2]}\n" for number, name in enumerate(FLAT[:30])))
    words = ["--data=ImageFolder", f"--data.root={tmp_path / 'images'}", f"--data.labels={tmp_path / 'list.csv'}"]
    words += ["--data.image_size=32", "--data.num_workers=0", "--data.batch_size=4", "--data.val_fraction=0.2"]
    rest = [word for word in TINY if not word.startswith("--data")]
    assert main(["fit", *words, f"--trainer.default_root_dir={tmp_path / 'run'}", *rest]) == 0
    assert "val/top1" in (tmp_path / "run" / "metrics.csv").read_text()
