"""The example of a stream: what it takes from this package exists, and with litdata it runs as it stands."""

import ast
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from PIL import Image

from distill.data import ImageFolder
from tests.program import ROOT

DOCUMENT = (ROOT / "experiments" / "foundation" / "streams.md").read_text()
BLOCKS = {name: text for text, name in re.findall(r"```\w+\n(# (\w+\.\w+)\n.*?)```", DOCUMENT, re.DOTALL)}


def test_what_the_example_takes_from_this_package_exists():
    imports = [
        (node.module, alias.name)
        for name, text in BLOCKS.items()
        if name.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("distill")
        for alias in node.names
    ]
    assert {name for _, name in imports} >= {"ImageFolder", "read_image", "photo_transform", "seeded_by"}
    for module, name in imports:
        assert hasattr(import_module(module), name), f"{module}.{name}"


@pytest.mark.slow
def test_the_example_gives_the_images_of_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 5)):
        for label in ("cat", "dog"):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "photos" / split / label / f"{number}.jpg")
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    subprocess.run([sys.executable, "shards.py", "photos", "shards"], check=True, timeout=600)
    settings = {"image_size": 32, "batch_size": 5, "num_workers": 0}
    folder = ImageFolder("photos", **settings)
    stream = import_module("my_stream").Shards("shards", num_classes=2, **settings)
    for batch, expected in zip(stream.val_dataloader(), folder.val_dataloader(), strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in ("image", "label", "index"))
    epochs = [[batch["index"].tolist() for batch in loader] for loader in [stream.train_dataloader()] * 2]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(40))
    assert epochs[0] != epochs[1]
