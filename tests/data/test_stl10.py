"""STL-10's own binary files, written small."""

import hashlib

import numpy as np
import pytest
import torch
from torchvision import datasets

from distill.data import STL10
from distill.errors import UserError


def write_stl10(root, train=20, test=10, unlabeled=6):
    """As its authors write it: each image's red, green and blue planes, column by column; labels from 1 to 10."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate({"train": train, "test": test, "unlabeled": unlabeled}.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 3 * 96 * 96), dtype=np.uint8)
        (folder / f"{name}_X.bin").write_bytes(pixels.tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(index % 10 + 1 for index in range(count)))
    (folder / "class_names.txt").write_text("\n".join(f"class {number}" for number in range(10)))
    return root


def pixel(root, name, index, channel, row, column):
    content = (root / "stl10_binary" / name).read_bytes()
    return content[index * 3 * 96 * 96 + channel * 96 * 96 + column * 96 + row]


def test_stl10_is_read_from_its_own_files(tmp_path):
    data = STL10(str(write_stl10(tmp_path)), verify=False, augment=False)
    train, test = data.samples("train"), data.samples("test")
    assert (len(train), len(test), len(data.samples("val"))) == (20, 10, 10)
    assert (data.num_classes, data.image_shape) == (10, (3, 96, 96))
    assert [train[index]["label"] for index in range(20)] == [*range(10), *range(10)]
    image = (train[13]["image"] * 255).round().byte()
    for place in ((0, 0, 0), (1, 5, 90), (2, 95, 3)):
        assert image[place].item() == pixel(tmp_path, "train_X.bin", 13, *place)
    assert (test[4]["image"][1, 2, 3] * 255).round().item() == pixel(tmp_path, "test_X.bin", 4, 1, 2, 3)


def test_images_without_a_label_come_only_if_asked_for(tmp_path):
    root = str(write_stl10(tmp_path))
    train = STL10(root, verify=False, unlabeled=True).samples("train")
    assert [train[index]["label"] for index in (19, 20, 25)] == [9, -1, -1]
    assert len(train) == 26
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").unlink()
    assert len(STL10(root, verify=False).samples("train")) == 20, "nor are they needed to be there"


def test_images_are_shrunk_as_published(tmp_path):
    data = STL10(str(write_stl10(tmp_path)), verify=False, image_size=32)
    image = data.samples("test")[0]["image"]
    full = STL10(str(tmp_path), verify=False).samples("test")[0]["image"]
    assert data.image_shape == image.shape == (3, 32, 32)
    assert torch.allclose(image.mean(), full.mean(), atol=0.01)
    assert data.samples("train")[(1, 0)]["image"].shape == (3, 32, 32)


def test_the_checksums_of_the_files_that_are_read_must_fit(tmp_path, monkeypatch):
    root = str(write_stl10(tmp_path))
    with pytest.raises(UserError, match="STL-10 in .* is incomplete or corrupt"):
        STL10(root).samples("train")

    def sums(files):
        return [
            [name, hashlib.md5((tmp_path / "stl10_binary" / name).read_bytes()).hexdigest()] for name, _ in files[:2]
        ]

    monkeypatch.setattr(datasets.STL10, "train_list", [*sums(datasets.STL10.train_list), ["unlabeled_X.bin", "0" * 32]])
    monkeypatch.setattr(datasets.STL10, "test_list", sums(datasets.STL10.test_list))
    assert len(STL10(root).samples("train")) == 20
    assert len(STL10(root).samples("test")) == 10
    with pytest.raises(UserError, match="incomplete or corrupt"):
        STL10(root, unlabeled=True).samples("train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("stl")), "has no folder 'stl10_binary'.*data.download=true"),
        (lambda folder: (folder / "train_y.bin").unlink(), "STL-10 in .* is incomplete or corrupt"),
        (lambda folder: (folder / "train_X.bin").write_bytes(b"123"), "STL-10 in .* is incomplete or corrupt"),
        (lambda folder: (folder / "train_y.bin").write_bytes(b"\1\2"), r"corrupt \(20 images and 2 labels\)"),
    ],
    ids=["another folder", "a file is missing", "images are cut short", "labels are cut short"],
)
def test_what_cannot_be_read_is_told_in_one_sentence(spoil, message, tmp_path):
    spoil(write_stl10(tmp_path) / "stl10_binary")
    with pytest.raises(UserError, match=message) as caught:
        STL10(str(tmp_path), verify=False).samples("train")
    assert "\n" not in str(caught.value)
