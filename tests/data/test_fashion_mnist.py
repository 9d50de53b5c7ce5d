"""Fashion-MNIST from small files in its format."""

import gzip
import shutil

import numpy as np
import pytest
import torch

from distill.data import ExponentialTail, FashionMNIST
from distill.errors import UserError


def idx(array):
    """An array of bytes in the idx format."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return head + array.astype(np.uint8).tobytes()


TRAIN, TEST = 400, 50


def files():
    """The four files, in which the first pixels tell the number of an image."""
    content = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
        content[f"{part}-images-idx3-ubyte"] = idx(images)
        content[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) * 7 % 10)
    return content


def write(folder, packed):
    folder.mkdir(parents=True)
    for name, content in files().items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("debian") / "files", packed=True))


def module(root, **settings):
    return FashionMNIST(root, **{"num_workers": 0, "batch_size": 8, "augment": False, **settings})


def numbers(data, split):
    """The number and the label of each image of a split."""
    source = data.samples(split).source
    return {int(source[i][0][0, 0, 0]) * 256 + int(source[i][0][0, 0, 1]): source[i][1] for i in range(len(source))}


def test_the_files_are_read_as_they_are_and_packed_and_as_torchvision_leaves_them(root, tmp_path):
    write(tmp_path / "plain", packed=False)
    write(tmp_path / "torchvision" / "FashionMNIST" / "raw", packed=False)
    found = [module(str(path)) for path in (root, tmp_path / "plain", tmp_path / "torchvision")]
    for split in ("train", "val", "test"):
        expected = numbers(found[0], split)
        assert all(numbers(data, split) == expected for data in found)
        assert all(label == number * 7 % 10 for number, label in expected.items())
    assert numbers(found[0], "test").keys() == set(range(TEST))
    batch = next(iter(found[0].train_dataloader()))
    assert batch["image"].shape == (8, 3, 28, 28)
    assert torch.equal(batch["image"][:, 0], batch["image"][:, 2])
    assert next(iter(module(root, image_size=32).train_dataloader()))["image"].shape == (8, 3, 32, 32)


def test_validation_images_are_held_out_by_their_number(root):
    few, more = module(root, val_fraction=0.1), module(root, val_fraction=0.3)
    assert numbers(few, "val").keys() < numbers(more, "val").keys()
    for data in (few, more):
        assert numbers(data, "train").keys() | numbers(data, "val").keys() == set(range(TRAIN))
        assert not numbers(data, "train").keys() & numbers(data, "val").keys()


def test_subsets_are_part_of_larger_ones_and_of_any_kind_of_number(root):
    sizes = (20, 50, 200)
    chosen = [numbers(module(root, train_size=size), "train").keys() for size in sizes]
    assert [len(part) for part in chosen] == list(sizes)
    assert chosen[0] < chosen[1] < chosen[2]
    assert max(chosen[0]) > TRAIN / 2, "not the first ones"
    data = module(root, train_size=50)
    assert numbers(data, "val") == numbers(module(root), "val")


def test_some_images_of_each_class_keep_their_label(root):
    data = module(root, train_size=200, labels_per_class=5)
    found = numbers(data, "train")
    assert data.class_counts() == [5] * 10
    assert found.keys() == numbers(module(root, train_size=200), "train").keys()
    assert list(found.values()).count(-1) == 150
    labeled = {number: label for number, label in found.items() if label >= 0}
    assert all(label == number * 7 % 10 for number, label in labeled.items())
    only = module(root, train_size=200, labels_per_class=5, labeled_only=True)
    assert numbers(only, "train") == labeled


def test_long_tails_work_as_with_any_data(root):
    counts = module(root, longtail=ExponentialTail(0.1)).class_counts()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 5 * counts[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"val_fraction": 1}, "data.val_fraction must be above 0 and below 1, given 1"),
        ({"train_size": 0}, "data.train_size must be at least 1"),
        ({"train_size": 401}, r"data.train_size is 401, more than the 3\d\d images that are not held out"),
        ({"labels_per_class": 41}, r"data.labels_per_class is 41, more than the \d+ training images of class \d: give"),
        ({"labels_per_class": 2, "longtail": ExponentialTail()}, "both set the labels of each class"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(root, settings, words):
    with pytest.raises(UserError, match=words):
        module(root, **settings).setup("fit")


def test_missing_data_name_the_package_and_its_command(tmp_path):
    with pytest.raises(UserError, match=r"has no folder 'FashionMNIST'.*apt-get install dataset-fashion-mnist"):
        FashionMNIST(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_damaged_files_are_refused(root, damage, tmp_path):
    shutil.copytree(root, tmp_path / "files")
    file = tmp_path / "files" / "train-labels-idx1-ubyte.gz"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40] if damage == "cut" else gzip.compress(idx(np.zeros(3))))
    with pytest.raises(UserError, match="data.root: Fashion-MNIST in .* is incomplete or corrupt"):
        module(str(tmp_path / "files")).setup("fit")
