import resource
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.transforms.functional import to_pil_image

from distill.__main__ import main
from distill.data import ImageFolder, TimmAugmentation, augmentation, photo_transform
from distill.errors import UserError
from tests.program import TINY


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                to_pil_image(torch.full((3, 40, 60), 0.25 if name == "cat" else 0.75)).save(folder / f"{number}.png")
    return tmp_path


def test_a_folder_of_classes_is_read(root):
    data = ImageFolder(str(root), image_size=32, batch_size=8, num_workers=0)
    assert data.num_classes == 2
    assert data.image_shape == (3, 32, 32)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    means = batch["image"].mean(dim=(1, 2, 3))
    assert torch.allclose(means, torch.where(batch["label"] == 0, 0.25, 0.75), atol=0.01)
    assert len(data.samples("test")) == 4, "without a test folder the validation images are the test"


def test_a_missing_folder_says_where_to_get_the_data(tmp_path):
    with pytest.raises(UserError, match=r"data.root: there is no folder .*nowhere.*image-net.org"):
        ImageFolder(str(tmp_path / "nowhere"))


def test_class_folders_that_differ_between_the_splits_are_refused(root):
    (root / "val" / "cow").mkdir()
    with pytest.raises(UserError, match="has other class folders"):
        ImageFolder(str(root))


def test_timms_augmentation_gives_images_that_are_not_normalized(root):
    augment = TimmAugmentation(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.0)
    data = ImageFolder(str(root), image_size=32, augment=augment, interpolation="bicubic", num_workers=0)
    images = torch.stack([data.samples("train")[(draw, 0)]["image"] for draw in range(8)])
    assert images.shape == (8, 3, 32, 32)
    assert images.min() >= -1e-5
    assert images.max() <= 1 + 1e-5
    assert len({image.mean().item() for image in images}) > 2, "the policy changes colors"


def test_erased_pixels_are_noise_about_the_mean_color(root):
    samples = ImageFolder(str(root), image_size=64, augment=TimmAugmentation(erasing=1.0)).samples("train")
    images = torch.stack([samples[(draw, 0)]["image"] for draw in range(20)])
    erased = (images - 0.25).abs() > 0.02  # all else has the folder's one color
    assert 0.02 < erased.float().mean() < 0.4
    red = images[:, 0][erased[:, 0]]
    assert abs(red.mean() - 0.485) < 0.02, "ImageNet's mean red, and"
    assert abs(red.std() - 0.229) < 0.02, "its deviation"


def test_a_policy_that_timm_does_not_know_is_refused(root):
    magic = TimmAugmentation(auto_augment="magic")
    message = r"auto_augment: timm knows no policy 'magic'"
    with pytest.raises(UserError, match=rf"^data\.augment: {message}"):
        ImageFolder(str(root), augment=magic).samples("train")
    with pytest.raises(UserError, match=rf"^data\.train_views: {message}"):
        ImageFolder(str(root), train_views=["weak", magic]).used_source("train")


def write(root, split, name, count=2, value=0.5, extension="png"):
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        to_pil_image(torch.full((3, 8, 8), value)).save(folder / f"{number}.{extension}")


def labels(data, split):
    source = data.samples(split).source
    return {Path(path).parent.name: label for path, label in zip(source.paths, source.labels, strict=True)}


@pytest.fixture
def letters(tmp_path):
    """Classes a to d, of which validation lacks a and the test lacks all but b and d."""
    for split, names in (("train", "abcd"), ("val", "bcd"), ("test", "bd")):
        for name in names:
            write(tmp_path, split, name, value=ord(name) / 255)
    return tmp_path


def test_every_split_is_numbered_by_the_training_classes(letters):
    data = ImageFolder(str(letters), image_size=8, num_workers=0)
    assert data.classes == ["a", "b", "c", "d"]
    assert labels(data, "train") == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert labels(data, "val") == {"b": 1, "c": 2, "d": 3}
    assert labels(data, "test") == {"b": 1, "d": 3}
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        shown = (batch["image"][:, 0, 0, 0] * 255).round().long()
        assert torch.equal(shown, batch["label"] + ord("a")), "images and labels belong together"


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_is_not_trained_is_refused_by_name(letters, split):
    write(letters, split, "C")
    with pytest.raises(
        UserError,
        match=rf"/{split} has other class folders than .*/train.*: 'C' of {split} is no class of train",
    ):
        ImageFolder(str(letters))


def test_hidden_files_and_folders_are_ignored(letters):
    expected = {split: labels(ImageFolder(str(letters)), split) for split in ("train", "val", "test")}
    for split in expected:
        for folder in (letters / split, letters / split / "b"):
            for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
                (folder / name).mkdir()
                (folder / name / "0.png").write_bytes(b"no image")
            for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
                (folder / name).write_bytes(b"no image")
    data = ImageFolder(str(letters))
    for split, known in expected.items():
        assert labels(data, split) == known
        assert len(data.samples(split)) == 2 * len(known)
    assert data.samples("train").source.notes == []


def test_what_is_unusual_about_the_folders_is_told_once(letters, recwarn):
    (letters / "train" / "b" / "notes.txt").write_text("")
    (letters / "train" / "c" / "picture.heic").write_bytes(b"")
    (letters / "train" / "c" / "README").write_bytes(b"")
    write(letters, "train", ".", count=3)
    write(letters, "train", "B")
    (letters / "test" / "c").mkdir()
    data = ImageFolder(str(letters), num_workers=0, batch_size=2)
    for _ in range(2):
        data.setup("fit")
        _ = data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
    told = [str(warning.message).removeprefix(f"{letters}/") for warning in recwarn]
    assert told == [
        "train: files left out for their extension: 3 (1 .txt, 1 no extension, 1 .heic)",
        "train: images left out since they are in no class folder: 3",
        "train: 'B', 'b' are different classes, though their names differ only in case",
        "val: there is no image of 2 of the 5 classes: 'B', 'a'",
        "test: there is no image of 3 of the 5 classes: 'B', 'a', 'c'",
    ]
    assert len(data.notes) == 5


def test_images_may_lie_deeper_in_their_class_and_behind_links(letters):
    write(letters, "train", "a/of one kind/and another", count=3)
    write(letters, "elsewhere", "more", count=4)
    (letters / "train" / "b" / "link").symlink_to(letters / "elsewhere" / "more")
    counts = ImageFolder(str(letters)).class_counts()
    assert counts == [5, 6, 2, 2]


def test_class_folders_in_a_single_folder_are_pointed_at(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, f"{split}/images", "cat")
        write(tmp_path, f"{split}/images", "dog")
    notes = ImageFolder(str(tmp_path)).samples("train").source.notes
    assert "'images' is the only class, and the folders in it ('cat', 'dog') are none" in notes[0]


@pytest.mark.parametrize("files", [[], ["0.txt", "1.heic"]])
def test_a_class_without_training_images_is_refused_by_name(letters, files):
    (letters / "train" / "e").mkdir()
    for name in files:
        (letters / "train" / "e" / name).write_text("")
    with pytest.raises(UserError, match="/train has no image of 'e'" + (r", only .*\(.txt, .heic\)" if files else "$")):
        ImageFolder(str(letters)).setup("fit")


def test_a_test_folder_without_class_folders_is_refused_when_it_is_used(letters):
    shutil.rmtree(letters / "test")
    (letters / "test").mkdir()
    data = ImageFolder(str(letters), batch_size=2)
    data.setup("fit")
    with pytest.raises(UserError, match="no class folders in .*/test"):
        data.test_dataloader()


def test_the_files_are_those_of_torchvision_in_its_order(root):
    for split in ("train", "val"):
        source = ImageFolder(str(root)).samples(split).source
        assert list(zip(source.paths, source.labels, strict=True)) == TorchvisionFolder(str(root / split)).samples


def saved_state(root):
    data = ImageFolder(str(root), num_workers=0, batch_size=2)
    data.train_dataloader()
    return data.state_dict()


def test_a_checkpoint_of_other_classes_is_refused(letters):
    state = saved_state(letters)
    ImageFolder(str(letters)).load_state_dict(state)
    for split in ("train", "val"):
        (letters / split / "b").rename(letters / split / "e")
    shutil.rmtree(letters / "test")
    with pytest.raises(UserError, match="class 1 is 'c' here, but was 'b' in the training of the checkpoint"):
        ImageFolder(str(letters)).load_state_dict(state)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1, 600), (600, 1), (3, 100), (400, 20), (31, 600), (1200, 70)])
def test_of_a_long_image_the_same_crop_is_taken(size, interpolation, monkeypatch):
    image = to_pil_image(torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    for side in (32, 57):
        part = photo_transform(side, False, interpolation)(image)
        monkeypatch.setattr(augmentation, "_LONG", 1e9)
        whole = photo_transform(side, False, interpolation)(image)
        monkeypatch.undo()
        assert part.shape == (3, side, side)
        assert (part - whole).abs().max() <= 2.01 / 255, "rounding"


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (40, 50)])
@pytest.mark.parametrize("augment", [False, True, TimmAugmentation(auto_augment="rand-m9-mstd0.5-inc1")])
def test_no_image_is_made_much_larger_than_its_crop(size, augment):
    image = to_pil_image(torch.zeros(3, *size, dtype=torch.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert photo_transform(224, augment, "bilinear")(image).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "KiB"


@pytest.mark.slow
def test_a_checkpoint_is_not_tested_on_other_classes(letters, tmp_path, capsys):
    def command(name, *args):
        data = ["--data=ImageFolder", f"--data.root={letters}", "--data.image_size=32", "--data.num_workers=0"]
        code = main([name, *data, "--data.batch_size=2", *[word for word in TINY if "--data" not in word], *args])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill:")]

    assert command("fit", f"--trainer.default_root_dir={tmp_path / 'run'}") == (0, [])
    checkpoint = f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    assert command("test", checkpoint) == (0, [])
    for split in ("train", "val"):
        (letters / split / "b").rename(letters / split / "z")
    shutil.rmtree(letters / "test")
    for name in ("test", "validate", "predict"):
        code, message = command(name, checkpoint)
        assert code == 2
        assert "data.root: class 1 is 'c' here, but was 'b' in the training of the checkpoint" in message[0]
    write(letters, "train", "y")
    code, message = command("test", checkpoint)
    assert code == 2
    assert "ckpt_path: the checkpoint was trained with 4 classes, but the data have 5" in message[0]
