"""Tiny-ImageNet's folders, as they are distributed and re-sorted, written small."""

import shutil

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from distill.data import TinyImageNet
from distill.errors import UserError

WNIDS = [f"n{number:08}" for number in range(1000, 1200)]


def write_tiny_imagenet(root, train=1, val=1):
    """As it is distributed: JPEGs of one color, whose red tells the class, some of them gray."""
    folder = root / "tiny-imagenet-200"
    annotations = []
    (folder / "val" / "images").mkdir(parents=True)
    for label, wnid in enumerate(WNIDS):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        color = torch.tensor([label / 200, 0.5, 0.5]).view(3, 1, 1).expand(3, 64, 64)
        picture = to_pil_image(color if label != 7 else color[:1])
        for number in range(train):
            picture.save(images / f"{wnid}_{number}.JPEG")
        for number in range(val):
            name = f"val_{number * 200 + (label * 77) % 200}.JPEG"
            picture.save(folder / "val" / "images" / name)
            annotations.append(f"{name}\t{wnid}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(sorted(annotations)) + "\n")
    (folder / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (folder / "test" / "images").mkdir(parents=True)
    return root


def sort_by_class(folder, inner=""):
    """What the usual scripts do to the validation images."""
    val = folder / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (val / wnid / inner).mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / wnid / inner / name)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tiny_imagenet(tmp_path_factory.mktemp("data"))


@pytest.fixture
def root(written, tmp_path):
    """A copy to be changed."""
    shutil.copytree(written, tmp_path / "data")
    return tmp_path / "data"


def assert_labels_are_the_colors(samples):
    for index in range(0, len(samples), 13):
        sample = samples[index]
        assert sample["image"][0].mean().item() == pytest.approx(sample["label"] / 200, abs=0.02)


def test_the_layout_of_the_archive_is_read(written):
    data = TinyImageNet(str(written), augment=False, num_workers=0)
    train, val = data.samples("train"), data.samples("val")
    assert (len(train), len(val), len(data.samples("test"))) == (200, 200, 200)
    assert (data.num_classes, data.image_shape) == (200, (3, 64, 64))
    assert sorted(val[index]["label"] for index in range(200)) == list(range(200))
    assert_labels_are_the_colors(train)
    assert_labels_are_the_colors(val)
    assert train[7]["image"].shape == (3, 64, 64), "a gray one has three channels too"


@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("left", ["nothing", "an empty folder and the table"])
def test_validation_images_sorted_by_class_are_read(root, inner, left):
    folder = root / "tiny-imagenet-200"
    sort_by_class(folder, inner)
    if left == "nothing":
        (folder / "val" / "images").rmdir()
        (folder / "val" / "val_annotations.txt").unlink()
    val = TinyImageNet(str(root), augment=False).samples("val")
    assert sorted(val[index]["label"] for index in range(len(val))) == list(range(200))
    assert_labels_are_the_colors(val)


def test_images_are_shrunk_as_published_and_shifted_by_an_eighth(written):
    data = TinyImageNet(str(written), image_size=32)
    assert data.image_shape == (3, 32, 32)
    train = data.samples("train")
    images = torch.stack([train[(draw, 150)]["image"] for draw in range(60)])
    assert images.shape == (60, 3, 32, 32)
    black = (images < 0.1).all(1)  # the frame that a shift has let in; the image itself has one color
    rows = black.all(dim=2).sum(1)
    assert (rows.min(), rows.max()) == (0, 4)
    plain = data.samples("val")[0]["image"]
    assert plain.std(dim=(1, 2)).max() < 0.02


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("tiny")), "has no folder 'tiny-imagenet-200'.*download=true"),
        (lambda folder: shutil.rmtree(folder / "train" / WNIDS[3]), "199 class folders, not the 200"),
        (lambda folder: shutil.rmtree(folder / "train" / WNIDS[3] / "images"), "lacks images: .*n00001003"),
        (lambda folder: (folder / "val" / "val_annotations.txt").unlink(), "neither val_annotations.txt nor the class"),
        (lambda folder: (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tdog\n"), "line 1 of .* names"),
        (lambda folder: (folder / "val" / "val_annotations.txt").write_text(""), "val_annotations.txt is empty"),
    ],
    ids=["another folder", "a class is missing", "a class is empty", "no labels", "a foreign class", "an empty table"],
)
def test_another_layout_is_told_in_one_sentence(spoil, message, root):
    spoil(root / "tiny-imagenet-200")
    with pytest.raises(UserError, match=message) as caught:
        _ = [TinyImageNet(str(root)).samples(split) for split in ("train", "val")]
    assert "\n" not in str(caught.value)


def test_an_image_that_is_cut_short_or_gone_is_named(root):
    samples = TinyImageNet(str(root)).samples("val")
    path = root / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"data.root: .*val_0.JPEG cannot be read \(.+\): download it again"):
        samples[0]
    path.unlink()
    with pytest.raises(UserError, match=r"val_0.JPEG cannot be read \(it is missing\)"):
        samples[0]


def test_a_download_that_is_no_archive_of_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "served.zip").write_bytes(b"not the archive")
    monkeypatch.setattr("distill.data.tiny_imagenet._URL", (tmp_path / "served.zip").as_uri())
    data = TinyImageNet(str(tmp_path / "data"), download=True)
    with pytest.raises(UserError, match=r"data.download: .*served.zip could not be downloaded") as caught:
        data.prepare_data()
    assert "\n" not in str(caught.value)


def test_nothing_is_fetched_where_the_data_are(written, monkeypatch):
    monkeypatch.setattr("distill.data.tiny_imagenet._URL", "file:///nowhere.zip")
    data = TinyImageNet(str(written), download=True)
    data.prepare_data()
    assert len(data.samples("train")) == 200
