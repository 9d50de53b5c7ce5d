"""Make an image folder of Open Clip Art, split by series.

    python experiments/clipart/make_folder.py

The drawings come from Debian's package `openclipart-png`. A class is a top folder with at least 90 drawings; the two
that collect what has no subject, `special` and `unsorted`, are left out. Transparent pixels become white, and every
drawing is centered on a white square and scaled to `--side` pixels. What was made before an interruption is kept: the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from distill.data.image_files import as_seen, open_image
from distill.errors import UserError, require_at_least
from distill.files import PART, write_atomic
from distill.randomness import derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCE = Path("/usr/share/openclipart/png")
OUTPUT = Path("data/clipart")
SIDE = 128
LEAST = 90
MIXED = {"special", "unsorted"}
"""Top folders without a subject."""
SPLITS = ("train", "val", "test")
SHARE = 0.15
"""Share of each class in validation, and in test."""
RECORD = "made_of.json"


def make(source: Path = SOURCE, output: Path = OUTPUT, side: int = SIDE, least: int = LEAST) -> Path:
    """Make the image folder, unless it is there.

    Args:
        source: folder of the package's drawings.
        output: the new folder, with `train`, `val` and `test`, each with a folder per class.
        side: of the square images, in pixels.
        least: number of drawings that make a top folder a class.

    Returns:
        The folder.

    Raises:
        UserError: the drawings are missing, fewer than two classes are left, a drawing cannot be read, or `output`
            holds something else.
    """
    require_at_least(8, **{"--side": side})
    parts = divide(drawings(source, least), source)
    record = {"side": side, "drawings": {split: list(map(str, parts[split])) for split in SPLITS}}
    if output.exists():
        if _record(output) != record:
            raise UserError(
                f"{str(output)!r} is not what this command makes of {str(source)!r} at {side} x {side} pixels: remove "
                "it, or give another --output"
            )
        return output
    unfinished = output.with_name(output.name + PART)
    if _record(unfinished) != record and unfinished.exists():
        rmtree(unfinished)
    write_atomic(unfinished / RECORD, json.dumps(record).encode())
    todo = [(drawing, unfinished / split / drawing) for split in SPLITS for drawing in parts[split]]
    for drawing, file in track(todo, "drawings", disable=not sys.stderr.isatty()):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + PART)
            white_square(source / drawing, side).save(partial, format="PNG")
            partial.replace(file)
    unfinished.rename(output)
    return output


def drawings(source: Path, least: int) -> list[Path]:
    """Return the drawings of all classes, relative to `source`, in sorted order.

    Raises:
        UserError: the drawings are missing, or fewer than two classes are left.
    """
    if not source.is_dir():
        raise UserError(
            f"Open Clip Art is missing in {str(source)!r}: install Debian's package with 'apt-get install "
            "openclipart-png', or give the folder of its drawings as --source"
        )
    found = []
    for folder in sorted(set(source.iterdir()), key=str):
        if folder.is_dir() and folder.name not in MIXED:
            files = sorted(file.relative_to(source) for file in folder.rglob("*.png"))
            if len(files) >= least:
                found.append(files)
    if len(found) < 2:
        raise UserError(
            f"{str(source)!r} has {len(found)} top folders with at least {least} drawings, and a data set needs 2: "
            "install Debian's package again with 'apt-get install --reinstall openclipart-png'"
        )
    return [file for files in found for file in files]


def series_name(drawing: Path) -> str:
    """Return the stem that the drawings of a series share: the file's name without numbers, in lower case."""
    name = drawing.stem.lower()
    return re.sub(r"[\W\d_]+", "_", name).strip("_") or name


def series(found: Sequence[Path], source: Path) -> list[list[Path]]:
    """Group drawings into series: those with the same stem, or with the same content under different names."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [f"stem {series_name(drawing)}" for drawing in found]
    for drawing, key in zip(found, keys, strict=True):
        parent[root(key)] = root(f"content {sha256((source / drawing).read_bytes()).hexdigest()}")
    groups: dict[str, list[Path]] = defaultdict(list)
    for drawing, key in zip(found, keys, strict=True):
        groups[root(key)].append(drawing)
    return list(groups.values())


def divide(found: Sequence[Path], source: Path) -> dict[str, list[Path]]:
    """Divide drawings into splits, so that no series is on two sides.

    A series with drawings of several classes (the package files some drawings twice) stays in training, and so does
    one that is larger than the share of its class. The others of a class are taken in the order of a hash of their
    first drawing's name, each to the side of validation and test that lacks more, until both have their share of the
    class without its too large series.
    """
    sizes: dict[str, int] = defaultdict(int)
    for drawing in found:
        sizes[drawing.parts[0]] += 1
    by_class: dict[str, list[list[Path]]] = defaultdict(list)
    parts: dict[str, list[Path]] = {split: [] for split in SPLITS}
    too_large: dict[str, int] = defaultdict(int)
    for group in series(found, source):
        (name, *others) = {drawing.parts[0] for drawing in group}
        if others:
            parts["train"] += group
        elif len(group) > SHARE * sizes[name]:
            parts["train"] += group
            too_large[name] += len(group)
        else:
            by_class[name].append(group)
    for name, groups in by_class.items():
        missing = dict.fromkeys(("test", "val"), round(SHARE * (sizes[name] - too_large[name])))
        for group in sorted(groups, key=lambda group: derive_seed("clipart", str(min(group)))):
            side = max(missing, key=lambda split: missing[split])
            if len(group) > missing[side]:
                side = "train"
            else:
                missing[side] -= len(group)
            parts[side] += group
    return {split: sorted(group) for split, group in parts.items()}


def white_square(file: Path, side: int) -> Image:
    """Read an image and scale it to fit into a square of `side` pixels, on whose white ground it is centered.

    Raises:
        UserError: the file is not an image.
    """
    from PIL import Image as Images

    with _of_any_size(), open_image(str(file)) as opened:
        factor = max(opened.size) // (4 * side)
        if factor > 1 and opened.mode in ("L", "LA", "RGB", "RGBA"):  # some drawings have 200 million pixels
            opened = opened.reduce(factor)
        image = as_seen(opened)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Images.new("RGB", (side, side), "white")
    scaled = image.resize((width, height), Images.Resampling.LANCZOS)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Lift Pillow's limit of pixels, which is for files of strangers."""
    from PIL import Image as Images

    limit, Images.MAX_IMAGE_PIXELS = Images.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Images.MAX_IMAGE_PIXELS = limit


def counts(folder: Path) -> dict[str, dict[str, int]]:
    """Return the number of images by split, by class; the largest class first."""
    record = _record(folder) or {"drawings": {split: [] for split in SPLITS}}
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0))
    for split, names in record["drawings"].items():
        for name in names:
            found[Path(name).parts[0]][split] += 1
    return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def table(rows: Mapping[str, Mapping[str, int]]) -> Table:
    """Return a table of the numbers of images."""
    shown = Table("class", show_footer=True)
    shown.columns[0].footer = "all"

    def column(name: str, numbers: Iterable[int]) -> None:
        shown.add_column(name, f"{sum(numbers):,}", justify="right")

    for split in SPLITS:
        column(split, [row[split] for row in rows.values()])
    column("all", [sum(row.values()) for row in rows.values()])
    for name, row in rows.items():
        shown.add_row(name, *(f"{number:,}" for number in (*row.values(), sum(row.values()))))
    return shown


def _record(folder: Path) -> dict[str, dict[str, list[str]]] | None:
    """Return what a folder was made of, `None` if it does not say."""
    file = folder / RECORD
    if not file.exists():
        return None
    content: dict[str, dict[str, list[str]]] = json.loads(file.read_text())
    return content


def main(args: Sequence[str]) -> int:
    """Make the folder and print its counts; return 2 after a user's error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help=f"folder of the drawings ({SOURCE})")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the new folder ({OUTPUT})")
    parser.add_argument("--side", type=int, default=SIDE, help=f"side of the images in pixels ({SIDE})")
    given = parser.parse_args(args)
    try:
        folder = make(given.source, given.output, given.side)
    except UserError as error:
        print(f"make_folder: {error}", file=sys.stderr)
        return 2
    Console().print(table(counts(folder)))
    print(os.fspath(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
