"""Every image is read once, and those that cannot be read are listed."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from distill.__main__ import main
from distill.data import Digits, ImageFolder, ImageReader, ListedTail
from distill.errors import UserError
from tests.program import TINY

BROKEN = ("train/cat/1.png", "train/dog/0.png", "val/dog/2.png")


@pytest.fixture
def root(tmp_path):
    """Two classes of three images a split, some of them broken; the test images are those of validation."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                to_pil_image(torch.rand(3, 12, 12)).save(tmp_path / split / name / f"{number}.png")
    for name in BROKEN:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_read_once_and_the_broken_ones_are_listed(root, workers):
    reader = ImageReader(ImageFolder(str(root), num_workers=workers))
    found = list(reader)
    assert reader.total == sum(read.images for read in found) == 12, "the test images are not read again"
    sentences = [f"{read.split} {sentence}" for read in found for sentence in read.broken]
    assert len(sentences) == len(BROKEN)
    for name, sentence in zip(BROKEN, sentences, strict=True):
        assert sentence.startswith(f"{name.split('/')[0]} {root / name} cannot be read (")


def test_of_a_long_tail_the_images_that_are_used_are_read(root):
    (root / "list.txt").write_text("train/cat/0.png 0\ntrain/dog/0.png 1\n")
    reader = ImageReader(ImageFolder(str(root), num_workers=0, longtail=ListedTail(str(root / "list.txt"))))
    assert [(read.split, read.images, len(read.broken)) for read in reader] == [("train", 2, 1), ("val", 6, 1)]


def test_images_in_memory_are_read_too():
    assert sum(read.images for read in ImageReader(Digits())) == 1078 + 270 + 449


class Own(LightningDataModule):
    """Data of a user's own, of which one sample fails."""

    num_classes = 2

    def train_dataloader(self):
        return DataLoader(self)

    def val_dataloader(self):
        return [DataLoader(self), DataLoader(range(4))]

    test_dataloader = train_dataloader

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {1: torch.zeros(1)}[index] if index else torch.zeros(1)


def test_the_samples_of_other_data_modules_are_read():
    found = {(read.split, read.images, *read.broken) for read in ImageReader(Own())}
    assert ("val", 4) in found
    assert ("train", 3, "image 2 of train cannot be read (KeyError: 2)") in found


CHECK = [word for word in TINY if not word.startswith("--data")]


def test_check_lists_the_broken_images_and_fails(root, capsys):
    data = ["--data=ImageFolder", f"--data.root={root}", "--data.image_size=32", "--data.num_workers=0"]
    assert main(["check", *data, "--data.batch_size=2", *CHECK]) == 0
    capsys.readouterr()
    assert main(["check", *data, "--data.batch_size=2", "--data", *CHECK]) == 2
    printed = capsys.readouterr()
    for name in BROKEN:
        assert f"{root / name} cannot be read" in printed.out
    assert "distill: data: 3 of 12 images cannot be read: replace or remove those listed above" in printed.err
    for name in BROKEN:
        (root / name).unlink()
    assert main(["check", *data, "--data.batch_size=2", *CHECK, "--data"]) == 0
    assert "All 9 images can be read." in capsys.readouterr().out


def test_the_workers_of_a_run_name_the_file(root, capsys):
    data = ["--data=ImageFolder", f"--data.root={root}", "--data.image_size=32", "--data.num_workers=1"]
    code = main(["fit", *data, "--data.batch_size=6", f"--trainer.default_root_dir={root / 'run'}", *CHECK])
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert message.startswith(f"distill: data.root: {root}/")
    assert "cannot be read (" in message


def test_a_label_that_is_no_class_is_refused():
    data = Digits()
    data.num_classes = 9
    with pytest.raises(
        UserError, match=r"data: image \d+ of train has label 9, but with 9 classes labels go from 0 to 8"
    ):
        data.setup("fit")
