"""Shipped configurations: each is valid, and trains on generated data."""

from pathlib import Path

import pytest
import torch
import yaml
from torchvision.transforms.functional import to_pil_image

from distill.__main__ import main
from tests.data.test_cifar import write_cifar100
from tests.data.test_fashion_mnist import write as write_fashion_mnist
from tests.data.test_stl10 import write_stl10
from tests.data.test_tiny_imagenet import write_tiny_imagenet
from tests.program import ROOT

EXPERIMENTS = ROOT / "experiments"
TRAINERS = sorted(f"trainer/{file.stem}" for file in (EXPERIMENTS / "trainer").glob("*.yaml"))
"""Settings of the trainer, to compose with any configuration."""
PARTS = {
    *("cifar100/recipe", "cifar100/transfer", "digits/recipe", "imagenet/deit", "imagenet/resnet", "transfer/linear"),
    *("cifar100_lt/recipe", "imagenet_lt/recipe"),
    *TRAINERS,
}
"""Parts of configurations, besides those in folders `pairs` and `methods` (`test_recipes.py`)."""
RUNS = {
    "imagenet/serkd_deit_tiny": "imagenet/deit",
    "imagenet/serkd_deit_small": "imagenet/deit",
    "imagenet/serkd_resnet18": "imagenet/resnet",
    "cifar100/transfer_deit_small": "cifar100/transfer",
    "cifar100/transfer_deit_tiny": "cifar100/transfer",
    "transfer/stl10": "transfer/linear",
    "transfer/tiny_imagenet": "transfer/linear",
    "cifar100/teacher": "cifar100/recipe",
    "cifar100/trg_resnet32x4_resnet8x4": "cifar100/recipe",
    "cifar100/trg_resnet32x4_deit_tiny": "cifar100/recipe",
    "cifar100_lt/imbalance_0.1": "cifar100_lt/recipe",
    "cifar100_lt/imbalance_0.02": "cifar100_lt/recipe",
    "cifar100_lt/imbalance_0.01": "cifar100_lt/recipe",
    "cifar100_lt/teacher": "cifar100_lt/imbalance_0.01",
    "imagenet_lt/recipe": "imagenet/resnet",
    "imagenet_lt/trg_resnet18": "imagenet_lt/recipe",
    "imagenet_lt/teacher": "imagenet_lt/recipe",
    "digits/longtail_teacher": "digits/longtail",
    "foundation/regression": "foundation/label_free",
    "fashion_mnist/longtail/teacher": "fashion_mnist/longtail/recipe",
}
"""The configuration that each is composed with, which may itself be composed."""
FILES = [
    str(file.relative_to(EXPERIMENTS).with_suffix(""))
    for file in sorted(EXPERIMENTS.rglob("*.yaml"))
    if file.parent.name != "sweeps" and file.name != "grid.yaml"  # see test_sweeps.py and test_grid.py
]
WHOLE = [name for name in FILES if name not in PARTS and not {"pairs", "methods"} & set(Path(name).parts)]
OFF = {"weights": "null", "drop_classifier": "false", "pretrained": "false"}
SMALL = [
    *("--data.batch_size=4", "--data.num_workers=0", "--trainer.devices=1", "--trainer.accelerator=cpu"),
    *("--trainer.precision=32", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"),
    *("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"),
]


def configs(name):
    before = configs(RUNS[name]) if name in RUNS else []
    return [*before, f"--config={EXPERIMENTS / name}.yaml"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write small data sets in place of ImageNet (with a list of its images), clip art, CIFAR-100 and STL-10."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for number in range(4):
            folder = tmp_path / "data" / "imagenet" / split / f"n{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.rand(3, 240, 240)).save(folder / f"{number}.png")
    for number in range(12):
        folder = tmp_path / "data" / "clipart" / ("train", "val", "test")[number % 3] / f"class{number // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.rand(3, 128, 128)).save(folder / f"{number}.png")
    write_cifar100(tmp_path / "data")
    write_stl10(tmp_path / "data")
    (tmp_path / "data" / "imagenet_lt").mkdir()
    listed = [f"train/n{number % 2}/{number}.png {number % 2}\n" for number in range(4)]
    (tmp_path / "data" / "imagenet_lt" / "ImageNet_LT_train.txt").write_text("".join(listed))
    return tmp_path


def without_weights(name):
    """Iterate over overrides that turn off files of weights and downloads."""
    model = {}
    for config in configs(name):
        model |= yaml.safe_load(Path(config.removeprefix("--config=")).read_text()).get("model", {})
    for side in ("student", "teacher"):
        given = (model.get(side) or {}).get("init_args", {})
        yield from (f"--model.{side}.{key}={off}" for key, off in OFF.items() if key in given)


def test_every_configuration_is_whole_or_composed():
    assert PARTS | set(RUNS) <= set(FILES)


@pytest.mark.parametrize("name", WHOLE)
def test_a_configuration_is_understood(name, data, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs(name), "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", ["digits/distill", "imagenet/serkd_deit_tiny"])
def test_a_trainers_configuration_goes_with_any(name, trainer, data, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs(name), f"--config={EXPERIMENTS / trainer}.yaml", "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "DDPStrategy" in printed.out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("foundation/")])  # test_foundation.py
def test_a_configuration_trains_and_tests(name, data, capsys):
    if name == "transfer/tiny_imagenet":
        write_tiny_imagenet(data / "data")
    verify = ["--data.verify=false"] if name.startswith("cifar100") or name == "transfer/stl10" else []
    tail = ["--data.longtail.imbalance=0.5"] if name.startswith("cifar100_lt/") else []  # two images per class here
    if name.startswith("fashion_mnist/"):
        root = write_fashion_mnist(data / "fashion", packed=True)
        tail = [f"--data.root={root}", "--data.train_size=null", "--data.labels_per_class=null"]
        tail += ["--data.longtail.imbalance=0.5"] if "/longtail/" in name else []
    settings = [*configs(name), *SMALL, *verify, *tail, *without_weights(name), "--trainer.default_root_dir=run"]
    assert main(["fit", *settings]) == 0, capsys.readouterr().err
    assert main(["test", *settings, "--ckpt_path=run/checkpoints/last.ckpt"]) == 0, capsys.readouterr().err
