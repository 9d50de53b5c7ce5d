"""The README's data set of one's own trains as it stands there."""

import re
import shlex
import sys

import pytest

from distill.__main__ import main
from tests.program import ROOT

README = (ROOT / "distill" / "data" / "README.md").read_text()
TINY = [
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"),
    *("--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


def block(first_line):
    found = re.search(rf"```\w+\n({re.escape(first_line)}\n.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {first_line!r}"
    return found[1]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with the README's two files, beside the configurations."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for name in ("my_patches.py", "my_patches.yaml"):
        (tmp_path / name).write_text(block(f"# {name}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_patches", None)


def test_a_data_set_of_ones_own_trains(written):
    command = next(line.strip() for line in README.splitlines() if "my_patches.yaml" in line and " fit " in line)
    words = shlex.split(command)
    assert main([*words[words.index("distill") + 1 :], *TINY]) == 0
    assert "val/top1" in (written / "runs/patches/metrics.csv").read_text()


def test_its_samples_are_patches_with_the_classes_of_both_photos(written):
    from my_patches import PhotoPatches

    data = PhotoPatches(batch_size=4)
    for split in ("train", "val", "test"):
        samples = data.samples(split)
        assert samples[0]["image"].shape == data.image_shape
        assert {samples[0]["label"], samples[len(samples) - 1]["label"]} == {0, 1}
    assert data.class_counts() == [91, 91]
