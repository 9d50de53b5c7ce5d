"""`distill probe`: a student's nearest neighbors on a data set."""

import re

import pytest
import torch

from distill import knn as probing
from distill.__main__ import main
from distill.cli.program import run
from distill.data import STL10, Digits
from distill.data.longtail import ExponentialTail
from distill.errors import UserError
from distill.export import load_student
from distill.knn import probe
from distill.networks import TorchModule
from tests.data.test_stl10 import write_stl10
from tests.data.test_tiny_imagenet import write_tiny_imagenet
from tests.nets import Convolutional
from tests.program import TINY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(["fit", *TINY, f"--trainer.default_root_dir={folder}"])
    return folder / "checkpoints/last.ckpt"


def percentage(printed):
    return float(re.findall(r"(\d+\.\d)\s*│\s*$", printed, re.MULTILINE)[0])


def literal_top1(student, data, neighbors, temperature):
    """Sample by sample, class by class."""
    with torch.no_grad():
        rows = {
            split: [
                (student(sample["image"].unsqueeze(0)).embedding[0], sample["label"])
                for sample in map(data.samples(split).__getitem__, range(len(data.samples(split))))
                if sample["label"] >= 0
            ]
            for split in ("train", "test")
        }
    right = 0
    for query, wanted in rows["test"]:
        near = sorted(((torch.cosine_similarity(query, row, dim=0).item(), label) for row, label in rows["train"]))
        votes = [0.0] * 10
        for cosine, label in near[-neighbors:]:
            votes[label] += 2.718281828 ** (cosine / temperature)
        right += votes.index(max(votes)) == wanted
    return right / len(rows["test"]), len(rows["train"])


@pytest.fixture
def few_digits(monkeypatch):
    """Digits with as many labels as a slow count takes."""
    data = Digits(labels_per_class=4, augment=False, batch_size=64)
    whole = data.samples("test")
    whole.source.images, whole.source.labels = whole.source.images[:60], whole.source.labels[:60]
    monkeypatch.setattr(data, "samples", lambda split: whole if split == "test" else Digits.samples(data, split))
    return data


def test_the_figure_is_that_of_a_literal_count(checkpoint, few_digits, monkeypatch):
    student = load_student(checkpoint)
    expected, remembered = literal_top1(student, few_digits, 7, 0.2)
    monkeypatch.setattr(probing, "_CHUNK", 200)  # five queries at a time
    found = probe(student, few_digits, neighbors=7, temperature=0.2)
    assert (found.memory_size, found.tested) == (remembered, 60) == (40, 60), "images without a label are left out"
    assert found.top1 == pytest.approx(expected)
    assert found.top1 > 0.3, "even two steps of training tell digits apart"


def test_the_memory_is_what_a_run_on_the_data_trains_on(checkpoint):
    student = load_student(checkpoint)
    settings = {"augment": False, "batch_size": 512, "train_views": ["weak", "strong"]}
    tailed = Digits(longtail=ExponentialTail(0.1), **settings)
    counts = tailed.class_counts()
    found = probe(student, tailed, neighbors=1, queries="val")
    assert found.memory_size == sum(counts) < 1078
    assert found.tested == 270, "validation images are all there"


def test_the_command_prints_the_figure_of_unchanged_images(checkpoint, capsys):
    assert main(["probe", f"--ckpt_path={checkpoint}", "--data=Digits", "--neighbors=5"]) == 0
    printed = capsys.readouterr().out
    expected = probe(load_student(checkpoint), Digits(augment=False), neighbors=5)
    assert percentage(printed) == pytest.approx(100 * expected.top1, abs=0.05)
    assert "1,078" in printed
    assert "449" in printed


def test_other_data_of_another_size_and_other_classes_are_probed(checkpoint, tmp_path, capsys):
    write_stl10(tmp_path)
    write_tiny_imagenet(tmp_path)
    settings = [f"--ckpt_path={checkpoint}", f"--data.root={tmp_path}", "--neighbors=1"]
    assert main(["probe", "--data=STL10", "--data.verify=false", *settings]) == 0
    capsys.readouterr()
    assert main(["probe", "--data=TinyImageNet", "--data.image_size=32", "--data.num_workers=0", *settings]) == 0
    assert percentage(capsys.readouterr().out) > 30, "test images are training images here, up to the JPEG's noise"


def test_images_are_resized_to_those_that_the_student_knows(checkpoint, tmp_path):
    write_stl10(tmp_path, train=20, test=20)
    for name in ("X", "y"):
        content = (tmp_path / "stl10_binary" / f"train_{name}.bin").read_bytes()
        (tmp_path / "stl10_binary" / f"test_{name}.bin").write_bytes(content)
    seen = []
    student = load_student(checkpoint)
    first = next(layer for layer in student.model.modules() if isinstance(layer, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda layer, given: seen.append(tuple(given[0].shape[1:])))
    found = probe(student, STL10(str(tmp_path), verify=False, augment=False, num_workers=0), neighbors=1)
    assert found.top1 == 1, "each image is its own neighbor"
    assert set(seen) == {(3, 32, 32)}


def test_a_broken_image_is_told_in_one_sentence_from_a_worker_too(checkpoint, tmp_path, capsys):
    write_tiny_imagenet(tmp_path)
    path = next((tmp_path / "tiny-imagenet-200" / "train").rglob("*.JPEG"))
    path.write_bytes(b"cut short")
    settings = ["--data=TinyImageNet", f"--data.root={tmp_path}", "--data.num_workers=1"]
    assert main(["probe", f"--ckpt_path={checkpoint}", *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"distill: data.root: {path} cannot be read")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data=Digits", "--neighbors=2000"], "neighbors is 2000, more than the 1078 labeled training images"),
        (["--data=Digits", "--neighbors=0"], "neighbors must be at least 1, given 0"),
        (["--data=Digits", "--temperature=0"], "temperature must be above 0, given 0.0"),
        (["--data=Digts"], "data: there is no class 'Digts': did you mean 'Digits'?"),
        (["--data=STL10", "--data.root=nowhere"], "data.root: 'nowhere' has no folder 'stl10_binary'"),
        (["--data=Digits", "--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no file 'nowhere.ckpt'"),
        ([], "data"),
    ],
)
def test_mistakes_get_one_sentence(settings, message, checkpoint, capsys):
    assert main(["probe", f"--ckpt_path={checkpoint}", *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_test_images_without_a_label_or_without_images_are_refused(checkpoint, few_digits):
    student = load_student(checkpoint)
    source = few_digits.samples("test").source
    source.labels = [-1] * len(source)
    with pytest.raises(UserError, match="data: none of its test images has a label, by which a prediction could be"):
        probe(student, few_digits)
    source.images, source.labels = source.images[:0], []
    with pytest.raises(UserError, match="data: Digits has no test images"):
        probe(student, few_digits)


def test_a_student_without_an_embedding_is_refused():
    student = TorchModule(Convolutional())
    student.build(10, (3, 32, 32))
    with pytest.raises(UserError, match=r"TorchModule\(Convolutional\) gives no embedding"):
        probe(student, Digits())
