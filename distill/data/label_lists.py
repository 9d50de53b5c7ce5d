"""Lists of images and their labels: text files or tables, one image per line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from distill.data.image_files import EXTENSIONS
from distill.errors import UserError, did_you_mean

_SEPARATORS = "\t,; "
_UNLABELED = ("", "-1")


@dataclass(frozen=True)
class Numbering:
    """Numbers of labels.

    Attributes:
        classes: names of the classes in the order of their labels; `None` if all are numbers.
        num_classes: of the training images: the number of their names, or their largest number plus 1.
        numbers: label of each name or written number; -1 for none.
    """

    classes: list[str] | None
    num_classes: int
    numbers: Mapping[str, int]


def read_label_list(file: str, key: str = "data.labels") -> dict[str, str]:
    """Read the labels of images from lines `path,label`, separated by a comma, tab, semicolon or spaces.

    A first line without an image is a header; of more than two columns it names `path` and `label`. An image without a
    label has nothing after its path, or -1. Absolute paths and those relative to another folder are returned as they
    are, without `./` and the like.

    Args:
        file: the list.
        key: of the list in messages.

    Returns:
        The label as it is written by path, in the order of the list; "" for none.

    Raises:
        UserError: the file is missing or has another format, or gives an image two labels.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")  # names of files may be any bytes
    except OSError as error:
        raise UserError(f"{key}: {file!r} cannot be read ({error.strerror})") from None
    rows = _rows(text)
    if not rows:
        raise UserError(f"{key}: {file!r} is empty: give lines 'path,label'")
    header = [] if any(map(_is_image, rows[0][1])) else [name.strip().casefold() for name in rows.pop(0)[1]]
    named = {"path", "label"} <= set(header)
    columns = (header.index("path"), header.index("label")) if named else (0, 1)
    labels: dict[str, str] = {}
    for number, row in rows:
        if (len(row) > 2 and not named) or not row[columns[0]].strip():
            raise UserError(
                f"{key}: line {number} of {file!r} is not 'path,label': {','.join(row)[:60]!r}; of more columns, the "
                "first line names two 'path' and 'label'"
            )
        path = os.path.normpath(row[columns[0]].strip())
        label = row[columns[1]].strip() if len(row) > columns[1] else ""
        label = "" if label in _UNLABELED else label
        if labels.setdefault(path, label) != label:
            raise UserError(
                f"{key}: line {number} of {file!r} gives {path} the label {label!r}, but an earlier line "
                f"{labels[path]!r}"
            )
    if not labels:
        raise UserError(f"{key}: {file!r} lists no image")
    return labels


def number_labels(training: Iterable[str], others: Iterable[str], without: str = "data.labels=none") -> Numbering:
    """Number the labels of images: numbers count as they are, names in their sorted order.

    Args:
        training: labels of the training images as they are written; "" for none.
        others: labels of validation and test images.
        without: the setting that asks for no labels, for messages.

    Raises:
        UserError: no training image has a label, or another image has a name that no training image has.
    """
    known, unknown = set(training) - {""}, set(others) - {""}
    key = without.partition("=")[0]
    if not known:
        raise UserError(f"{key}: no training image has a label: give {without} to train without")
    if all(label.isdecimal() for label in known | unknown):
        numbers = {label: int(label) for label in known | unknown}
        return Numbering(None, 1 + max(numbers[label] for label in known), {"": -1, **numbers})
    if unknown := unknown - known:
        first = min(unknown)
        raise UserError(
            f"{key}: no training image has the label {first!r} of an image of another split "
            f"({did_you_mean(first, known)})"
        )
    classes = sorted(known)
    return Numbering(classes, len(classes), {"": -1, **{name: label for label, name in enumerate(classes)}})


def _rows(text: str) -> list[tuple[int, list[str]]]:
    """Return the cells of the lines that are not empty with the lines' numbers, at the first separator that fits."""
    lines = [line for line in text.splitlines() if line.strip() and not _is_image(line)]
    for separator in _SEPARATORS:
        rows = _cells("\n".join(lines[:2]), separator)  # a header and an image with its label, or two of these
        if any(len(row) > 1 and any(map(_is_image, row)) for _, row in rows):
            return _cells(text, separator)
    return _cells(text, ",")


def _cells(text: str, separator: str) -> list[tuple[int, list[str]]]:
    if separator == " ":
        lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
        return [(number, [line] if _is_image(line) else line.rsplit(maxsplit=1)) for number, line in lines if line]
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]


def _is_image(cell: str) -> bool:
    return cell.strip().lower().endswith(EXTENSIONS)


def require_files(file: str, root: Path, paths: Sequence[str], key: str = "data.labels") -> None:
    """Require listed files to exist.

    Raises:
        UserError: some do not; the message has their number and the first.
    """
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise UserError(
            f"{key}: {len(missing):,} of the images that {file!r} lists are missing, first {missing[0]}: paths are "
            f"relative to data.root, {root}"
        )
