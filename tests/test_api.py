"""`distill.fit`: a run like the command line's, from Python."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import Tensor, nn

import distill
from distill.__main__ import main
from distill.api import _data, _named_network
from distill.configurable import arguments_of
from distill.data import Digits, ExponentialTail, ImageData, Mixing
from distill.given import Writer
from distill.heads import KD, RKD, RRD
from distill.networks import WeightsFile
from distill.schedules import Linear
from tests.program import ROOT

QUICK = {
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


def fit(student: Any = "test_resnet", teacher: Any = None, **arguments: Any) -> distill.api.Fitted:
    given = {"data": "Digits", "epochs": 1, "batch_size": 16, "accelerator": "cpu", "folder": "run", "options": QUICK}
    return distill.fit(student, teacher or distill.Timm("test_vit"), **{**given, **arguments})


class Net(nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.stem(image).relu().mean((2, 3)))
        return logits


class Bright(distill.RelationHead):
    """A head of the user's own."""

    needs = frozenset({"embedding"})

    def tokens(self, features: Any, batch: Any) -> Tensor:
        return features["embedding"]

    def relate(self, tokens: Tensor) -> Tensor:
        return tokens @ tokens.mT

    def compare(self, student_relation: Tensor, teacher_relation: Tensor) -> Tensor:
        return (student_relation - teacher_relation).square().mean()


class Few(Digits):
    """Data of the user's own."""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_run_is_the_one_of_the_command_line_and_is_exported_probed_and_resumed_there(capsys: Any) -> None:
    heads = {"rkd": RKD(distance=1.0), "kd": distill.Term(KD(temperature=Linear(4.0, 1.0)), 0.5)}
    student, results, folder = fit(heads=heads)
    assert folder == Path("run")
    assert results == json.loads(Path("run/results.json").read_text())
    assert type(student) is type(timm.create_model("test_resnet"))
    assert not student.training
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("a.yaml").write_text(Path("run/config.yaml").read_text())
    assert main(["fit", "--config=a.yaml", "--trainer.default_root_dir=again"]) == 0
    saved, again = (torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("run", "again"))
    assert all(torch.equal(tensor, again["state_dict"][key]) for key, tensor in saved["state_dict"].items())
    assert config["model"]["heads"]["rkd"]["head"]["init_args"]["distance"] == 1.0
    assert (
        config["model"]["heads"]["kd"]["head"]["init_args"]["temperature"]["class_path"] == "distill.schedules.Linear"
    )
    last = "--ckpt_path=run/checkpoints/last.ckpt"
    assert main(["export", last, "--output=student.safetensors"]) == 0
    assert main(["probe", last, "--data=Digits", "--data.labels_per_class=5", "--neighbors=5"]) == 0
    assert main(["fit", "--config=a.yaml", "--resume", "--trainer.max_epochs=2"]) == 0, capsys.readouterr().err
    longer = fit(heads=heads, epochs=2, resume=True)  # the run is over: nothing is repeated
    assert longer.results["epochs"] == 2
    image = torch.rand(2, 3, 32, 32)
    network = distill.load_student("run/checkpoints/last.ckpt")
    assert torch.equal(network(image)["logits"], longer.student(network.prepare(image)))


def test_objects_of_the_users_own_are_passed_as_they_are_and_resume_by_the_same_call(capsys: Any) -> None:
    given = {"heads": {"bright": Bright()}, "data": Few(batch_size=16), "batch_size": None}
    net = Net()
    student, results, _ = fit(net, **given)
    assert student is net
    assert "train/bright" in Path("run/metrics.csv").read_text().splitlines()[0].split(",")
    init = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["student"]["init_args"]
    assert init["module"]["init_args"] == {"name": "model.student.module", "type": f"{__name__}.Net"}
    resumed = fit(Net(), **given, epochs=2, resume=True)
    assert (results["steps"], resumed.results["steps"]) == (2, 4)
    last = Path("run/checkpoints/last.ckpt")
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(distill.load_student(last, student=Net())(image)["logits"], resumed.student(image))
    with pytest.raises(
        distill.UserError, match=r"given an object of .*Net, which a configuration only names: use distil"
    ):
        distill.load_student(last)
    assert main(["export", f"--ckpt_path={last}", "--output=a"]) == 2
    assert "distill.load_student(path, student=...)" in capsys.readouterr().err
    assert main(["fit", "--config=run/config.yaml", "--resume"]) == 2
    assert "use distill.fit with the same objects" in capsys.readouterr().err
    with pytest.raises(distill.UserError, match=r"student: TorchModule\(Sequential\) does not fit the weights of"):
        distill.load_student(last, student=nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))


def test_a_plain_module_teaches_with_the_weights_it_has(tmp_path: Path) -> None:
    teacher = timm.create_model("test_resnet", num_classes=10)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    fit("test_vit", teacher, heads={"kd": "KD"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    arguments = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["teacher"]["init_args"]
    assert arguments["mean"] == list(teacher.pretrained_cfg["mean"])
    assert arguments["std"] == list(teacher.pretrained_cfg["std"])


def test_several_teachers_are_given_by_name() -> None:
    teachers = {"a": distill.Timm("test_vit"), "b": distill.Timm("test_vit2"), "both": distill.Ensemble(["a", "b"])}
    heads = {"kd": distill.Term(KD(), teacher="both"), "rkd": distill.Term(RKD(), teacher="a")}
    arguments = {"data": "Digits", "epochs": 1, "batch_size": 16, "accelerator": "cpu", "options": QUICK}
    results = distill.fit("test_resnet", teachers=teachers, heads=heads, **arguments).results
    assert {"val/a/agreement", "val/b/agreement", "val/both/agreement"} <= results["last"].keys()


def test_everything_of_this_package_that_has_arguments_can_be_said() -> None:
    writer = Writer()
    tail = ExponentialTail(imbalance=0.1)
    assert writer.write(Digits(mixing=Mixing(mixup=0.2), longtail=tail), "data") == {
        "class_path": "Digits",
        "init_args": {
            "mixing": vars(Mixing(mixup=0.2)),
            "longtail": {"class_path": "ExponentialTail", "init_args": {"imbalance": 0.1}},
        },
    }
    network = distill.Timm("test_vit", weights=WeightsFile("a.pt", prefix="student"), taps=["blocks.0"])
    assert writer.write(network, "model.student") == {
        "class_path": "Timm",
        "init_args": {
            "name": "test_vit",
            "weights": {**vars(WeightsFile("a.pt", prefix="student")), "file": "a.pt"},
            "taps": ["blocks.0"],
        },
    }
    assert writer.write(RRD(size=8), "a") == {"class_path": "RRD", "init_args": {"size": 8}}
    assert writer.write(partial(torch.optim.SGD, lr=0.1), "a") == {
        "class_path": "torch.optim.sgd.SGD",
        "init_args": {"lr": 0.1},
    }
    assert not writer.objects
    with pytest.raises(distill.UserError, match="model.optimizer: no configuration can say <function"):
        writer.write(lambda parameters: None, "model.optimizer")


def test_arguments_are_remembered_by_name_and_survive_copies() -> None:
    temperature = Linear(4.0, 1.0)
    head = KD(temperature)
    assert arguments_of(head) == {"temperature": temperature}
    assert arguments_of(arguments_of(copy.deepcopy(head))["temperature"]) == {"start": 4.0, "end": 1.0}
    assert arguments_of(pickle.loads(pickle.dumps(RKD(1.0)))) == {"distance": 1.0}
    assert arguments_of(Digits(3, batch_size=8)) == {"labels_per_class": 3, "batch_size": 8}


def test_names_stand_for_the_networks_of_three_libraries(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    for name, library in {
        "vit_small_patch14_dinov2": "Timm",
        "vit_small_patch14_dinov2.lvd142m": "Timm",
        "resnet8x4_cifar": "Timm",
        "resnet18": "Timm",
        "googlenet": "Torchvision",
        "facebook/dinov2-small": "HuggingFace",
        "mine": "HuggingFace",
        "resnet81": "Timm",  # which knows near names
    }.items():
        for pretrained in (True, False):
            arguments = {"name": name, "pretrained": pretrained}
            assert _named_network(name, pretrained) == {"class_path": library, "init_args": arguments}
    for name, library in (("timm/resnet18", "Timm"), ("torchvision/resnet18", "Torchvision")):
        expected = {"class_path": library, "init_args": {"name": "resnet18", "pretrained": True}}
        assert _named_network(name, True) == expected


def test_a_folder_has_labels_where_it_has_class_folders(tmp_path: Path) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "one.JPG").touch()
    arguments = {"root": "images", "labels": "none", "val_fraction": 0.1, "batch_size": 8}
    assert _data("images", 8, Writer()) == {"class_path": "ImageFolder", "init_args": arguments}
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
    photos = str(tmp_path / "photos")
    (tmp_path / "photos" / "train" / "._one.jpg").touch()  # as other systems put beside images
    (tmp_path / "photos" / "train" / "folder.png").mkdir()
    assert _data(tmp_path / "photos", None, Writer()) == {"class_path": "ImageFolder", "init_args": {"root": photos}}
    assert _data("photos/train", None, Writer())["init_args"] == {"root": "photos/train", "val_fraction": 0.1}


class Nothing(ImageData):
    """Data without shapes."""

    def samples(self, split: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": "resnet81"}, "model.student: timm has no model 'resnet81': did you mean 'resnet18'"),
        ({"data": "Digit"}, "data: there is no folder 'Digit', nor a data set: did you mean 'Digits'?"),
        ({"data": Nothing(), "batch_size": None}, "data: Nothing has no num_classes, which the networks are built for"),
        ({"data": Few()}, "batch_size: the data module was given as an object: set its own batch size"),
        ({"heads": {"rkd": "RDK"}}, "model.heads.rkd.head: there is no class 'RDK'"),
        ({"lr": 0.1, "optimizer": torch.optim.SGD}, "lr: it is the learning rate of the default optimizer"),
        ({"options": {"trainer.maxepochs": 3}}, "there is no option --trainer.maxepochs: did you mean"),
        ({"epochs": 0}, "epochs must be above 0, given 0"),
    ],
)
def test_mistakes_are_raised_in_one_sentence_and_leave_nothing(arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(distill.UserError) as found:
        fit(**arguments)
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_built_is_refused_since_its_weights_would_be_lost() -> None:
    teacher = distill.Timm("test_vit")
    teacher.build(10, (3, 32, 32))
    with pytest.raises(distill.UserError, match="model.teacher: this test_vit is built already, .*: give its `model`"):
        fit(teacher=teacher)


SCRIPT = """
import distill
from torch import nn
from distill.heads import RKD, RRD

if __name__ == "__main__":
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), *pooling, nn.Linear(8, 10))
    student, results, folder = distill.fit(
        net, distill.Timm("test_vit"), data="Digits", heads={"rkd": RKD(), "rrd": RRD(size=32)}, epochs=1, batch_size=8,
        accelerator="cpu", devices=2, folder="run", options={
            "trainer.strategy": "ddp", "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1,
            "trainer.enable_progress_bar": False,
        },
    )
    assert student is net
    print(f"devices: {results.get('devices')}.")
"""


@pytest.mark.slow
def test_a_script_trains_on_two_ranks_with_objects_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    assert sorted(line for line in found.stdout.splitlines() if "devices:" in line) == ["devices: 2.", "devices: None."]
    assert json.loads((tmp_path / "run/results.json").read_text())["effective_batch"] == 16
