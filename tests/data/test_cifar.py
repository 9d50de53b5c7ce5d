"""CIFAR's own files, written small."""

import pickle

import numpy as np
import pytest
import torch

from distill.data import CIFAR10, CIFAR100
from distill.errors import UserError


def write_cifar100(root, train=200, test=100):
    """CIFAR-100 as its authors write it: pickled rows of 3,072 bytes, red, green and blue planes in turn."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 0), ("test", test, 1)):
        data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [index % 100 for index in range(count)]
        content = {"data": data, "fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": [str(n) for n in range(100)], "coarse_label_names": [str(n) for n in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    return root


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = np.full((20, 3072), number, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [n % 10 for n in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    return root


def test_cifar100_is_read_from_its_own_files(tmp_path):
    data = CIFAR100(str(write_cifar100(tmp_path)), verify=False, augment=False)
    train, test = data.samples("train"), data.samples("test")
    assert (len(train), len(test), len(data.samples("val"))) == (200, 100, 100)
    with open(tmp_path / "cifar-100-python" / "train", "rb") as file:
        row = pickle.load(file)["data"][7]
    assert train[7]["label"] == 7
    assert torch.equal((train[7]["image"] * 255).round().byte(), torch.from_numpy(row).view(3, 32, 32))


def test_cifar10_is_read_from_its_own_files(tmp_path):
    train = CIFAR10(str(write_cifar10(tmp_path)), verify=False, augment=False).samples("train")
    assert len(train) == 100
    assert train[45]["image"].unique().tolist() == pytest.approx([2 / 255]), "the third file"


def test_held_out_images_are_as_many_of_each_class_and_not_trained_with(tmp_path):
    data = CIFAR100(str(write_cifar100(tmp_path)), verify=False, held_out=100, augment=False)
    train, val = data.samples("train"), data.samples("val")
    labels = [sorted(part[index]["label"] for index in range(len(part))) for part in (train, val)]
    assert labels == [list(range(100)), list(range(100))]
    assert not any(torch.equal(train[n]["image"], val[n]["image"]) for n in range(100))


def test_training_images_are_shifted_and_flipped(tmp_path):
    samples = CIFAR100(str(write_cifar100(tmp_path)), verify=False).samples("train")
    plain = CIFAR100(str(tmp_path), verify=False, augment=False).samples("train")[3]["image"]
    images = [samples[(epoch, 3)]["image"] for epoch in range(40)]
    assert all(image.shape == (3, 32, 32) for image in images)
    assert len({image.numpy().tobytes() for image in images}) > 30
    framed = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    crops = [framed[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    assert all(any(torch.equal(image, crop) or torch.equal(image.flip(2), crop) for crop in crops) for image in images)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("cifar")), "has no folder 'cifar-100-python'"),
        (lambda folder: (folder / "train").unlink(), "CIFAR-100 in .* is incomplete or corrupt"),
        (lambda folder: (folder / "train").write_bytes(b"\x80\x04"), "CIFAR-100 in .* is incomplete or corrupt"),
    ],
    ids=["another folder", "a file is missing", "a file is cut short"],
)
def test_what_cannot_be_read_is_told_in_one_sentence(spoil, message, tmp_path):
    spoil(write_cifar100(tmp_path) / "cifar-100-python")
    with pytest.raises(UserError, match=message):
        CIFAR100(str(tmp_path), verify=False).samples("train")


def test_altered_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="incomplete or corrupt"):
        CIFAR100(str(write_cifar100(tmp_path))).samples("train")


def test_held_out_must_divide_among_the_classes(tmp_path):
    with pytest.raises(UserError, match="multiple of the 100 classes, given 30"):
        CIFAR100(str(write_cifar100(tmp_path)), held_out=30)
