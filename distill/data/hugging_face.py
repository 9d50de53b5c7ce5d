"""Image data sets of Hugging Face's datasets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from distill.data.dataset import Split
from distill.data.decoders import READERS, Decoder
from distill.data.held_out import divide, require_fraction
from distill.data.image_files import first_line
from distill.data.label_lists import number_labels
from distill.data.photos import PhotoData
from distill.data.sources import Source, Subset
from distill.errors import UserError, did_you_mean, one_of

if TYPE_CHECKING:
    from PIL.Image import Image

_USUAL_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


class HuggingFaceImages(PhotoData):
    """Images of a data set of Hugging Face's datasets, with the pixels that `ImageFolder` has for the same files.

    Needs the extra `datasets`. Nothing is looked up on the net for what is on the disk.

    Args:
        path: a folder that `save_to_disk` wrote, a folder of parquet files or of images (as `load_dataset` takes them),
            a parquet or arrow file, or the name of a data set on the hub, which is downloaded; in Python also a
            `Dataset`, or a mapping of them by split.
        name: of the configuration, for data sets that have several.
        image: column of the images.
        label: column of the labels: classes, numbers or names, whose sorted order numbers the classes; missing and
            negative ones are none. With null, the images have no labels.
        splits: the data set's split for `train`, `val` and `test`. By default those of the usual names: `train` (or the
            only one there is), `validation`, `val`, `valid` or `dev`, and `test`. Without a split for `test`, the
            validation images are the test images too.
        val_fraction: share of the training images that is held out for validation, where there is no split for `val`.
            The number of an image's row decides, so the same are held out in all runs, also when rows are appended.
        settings: further settings, see `PhotoData` and `ImageData`.

    Attributes:
        num_classes: number of classes; 0 without labels.
        classes: their names, in the order of their labels; `None` without names.

    Raises:
        UserError: the data set cannot be loaded or is a stream, a split or a column is missing, a column holds
            something else, or there are no validation images or two kinds of them; later, an image cannot be read.
    """

    def __init__(
        self,
        path: str | Any,
        name: str | None = None,
        image: str = "image",
        label: str | None = "label",
        splits: dict[str, str] | None = None,
        val_fraction: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root=path if isinstance(path, str) else ".", **settings)
        require_fraction(val_fraction)
        self.image = image
        self.val_fraction = val_fraction
        loaded = _loaded(path, name)
        self._splits = _chosen_splits(list(loaded), splits)
        if "val" not in self._splits and val_fraction is None:
            raise UserError(
                f"data.splits: none of {', '.join(map(repr, loaded))} is taken for validation: name one as "
                "data.splits.val, or give data.val_fraction, such as 0.1, to hold out training images"
            )
        if "val" in self._splits and val_fraction is not None:
            raise UserError(
                f"data.val_fraction {val_fraction} would hold out training images, but {self._splits['val']!r} is the "
                "split for validation: leave one of them out (data.splits without val)"
            )
        self._rows = {split: _images(loaded[origin], image, origin) for split, origin in self._splits.items()}
        columns = {split: loaded[origin] for split, origin in self._splits.items()}
        self.classes, self.num_classes, self._labels = _labels(columns, label)

    def source(self, split: Split) -> Source:
        """Return the images of a split."""
        split = "val" if split == "test" and "test" not in self._splits else split
        held_out = split == "val" and "val" not in self._splits
        origin: Split = "train" if held_out else split
        rows = _Rows(self._rows[origin], self.image, self._labels[origin], self._splits[origin], self.decoder)
        if self.val_fraction is None or split == "test":
            return rows
        return Subset(rows, divide(range(len(rows)), self.val_fraction)[held_out])


class _Rows:
    """The images of a split, decoded as image files are, with their labels."""

    def __init__(self, rows: Any, column: str, labels: list[int], split: str, decoder: Decoder) -> None:
        self.rows = rows
        self.column = column
        self.labels = labels
        self.split = split
        self.decoder: Decoder = decoder

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image | Tensor, int]:
        name = f"data.path: row {index} of {self.split!r}"
        cell = self.rows[index][self.column] or {}
        file = cell.get("bytes") or cell.get("path")
        if not file:
            raise UserError(f"{name} has no image in the column {self.column!r}: remove the row")
        return READERS[self.decoder](file, name), self.labels[index]


def _loaded(path: str | Any, name: str | None) -> Mapping[str, Any]:
    """Return the data sets of `datasets` at a path, by split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"HuggingFaceImages needs the package datasets ({error}): install the extra 'datasets'"
        ) from None
    found = path
    if isinstance(path, str):
        counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts and not os.path.exists(path)  # or a local folder is counted
        try:
            found = _load(path, name)
        except Exception as error:  # datasets, pyarrow and the hub raise many types
            raise UserError(
                f"data.path: {path!r} cannot be loaded ({first_line(error)}): give a folder or file that datasets can "
                "load, or the name of a data set on the hub"
            ) from None
        finally:
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
    found = {"train": found} if isinstance(found, datasets.Dataset) else found
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"data.path: HuggingFaceImages needs a Dataset or several by split, not {type(found).__name__}")
    for split, rows in found.items():
        if not isinstance(rows, datasets.Dataset):
            raise UserError(
                f"data.path: {split!r} is a {type(rows).__name__}, but images are drawn by their number, which only a "
                "Dataset can: a stream needs a data module of your own"
            )
    return found


def _load(path: str, name: str | None) -> Any:
    import datasets

    local = Path(path)
    if local.suffix in _FILES and local.is_file():
        return datasets.load_dataset(_FILES[local.suffix], data_files=path)
    if any((local / file).is_file() for file in ("state.json", "dataset_dict.json")):  # of save_to_disk
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path, name)


def _chosen_splits(known: list[str], splits: Mapping[str, str] | None) -> dict[Split, str]:
    """Return the data set's split for each of ours that there is."""
    if splits is None:
        usual = {split: name for split, names in _USUAL_SPLITS.items() if (name := _first_of(names, known)) is not None}
        return {"train": known[0]} if not usual and len(known) == 1 else _with_training(usual, known)
    for split, name in splits.items():
        one_of("data.splits", split, get_args(Split))
        one_of(f"data.splits.{split}", name, known)
    return _with_training({split: splits[split] for split in _USUAL_SPLITS if split in splits}, known)


def _first_of(names: tuple[str, ...], known: list[str]) -> str | None:
    return next((name for name in names if name in known), None)


def _with_training(splits: dict[Split, str], known: list[str]) -> dict[Split, str]:
    if "train" not in splits:
        raise UserError(
            f"data.splits: none of {', '.join(map(repr, known))} is taken for training: name one as data.splits.train"
        )
    return splits


def _images(rows: Any, column: str, split: str) -> Any:
    """Return rows whose only column has the images as they are stored, after checking that it has images."""
    from datasets import Image, Value

    _require_column(rows, column, "data.image", split)
    feature = rows.features[column]
    is_stored = isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()
    if not (isinstance(feature, Image) or is_stored or feature in (Value("binary"), Value("large_binary"))):
        raise UserError(f"data.image: the column {column!r} of {split!r} holds {_kind(feature)}, not images")
    if not len(rows):
        raise UserError(f"data.path: {split!r} has no row")
    stored = rows.with_format(None).select_columns([column]).cast_column(column, Image(decode=False))
    _Rows(stored, column, [-1], split, "pil")[0]
    return stored


def _labels(rows: Mapping[Split, Any], column: str | None) -> tuple[list[str] | None, int, dict[Split, list[int]]]:
    """Return the names of the classes, their number and the label of each row, by split."""
    from datasets import ClassLabel

    if column is None:
        return None, 0, {split: [-1] * len(part) for split, part in rows.items()}
    values = {split: _values(part, column, split) for split, part in rows.items()}
    feature = rows["train"].features[column]
    if isinstance(feature, ClassLabel):
        for split, part in rows.items():
            if getattr(part.features[column], "names", None) != feature.names:
                raise UserError(f"data.label: the classes of {column!r} in {split} are not those of train")
        numbers = {split: [-1 if value is None else max(value, -1) for value in values[split]] for split in rows}
        return list(feature.names), feature.num_classes, numbers
    written = {split: [_written(value) for value in part] for split, part in values.items()}
    others = [label for split, part in written.items() if split != "train" for label in part]
    numbering = number_labels(written["train"], others, "data.label=null")
    numbers = {split: [numbering.numbers[label] for label in part] for split, part in written.items()}
    return numbering.classes, numbering.num_classes, numbers


def _values(rows: Any, column: str, split: str) -> list[Any]:
    """Return the values of a column of labels."""
    _require_column(rows, column, "data.label", split)
    if not (kind := _kind(rows.features[column])).startswith(("int", "uint", "bool", "string", "large_string")):
        raise UserError(f"data.label: the column {column!r} of {split} holds {kind}, not classes")
    table = rows.with_format(None).select_columns([column]).with_format("arrow")[:]
    return list(table[column].to_pylist())


def _written(value: Any) -> str:
    """Return a label as it would be written in a list, "" for none."""
    if value is None or (not isinstance(value, str) and value < 0):
        return ""
    return value.strip() if isinstance(value, str) else str(int(value))


def _require_column(rows: Any, column: str, key: str, split: str) -> None:
    if column not in rows.column_names:
        without = ", or null to train without labels" if key == "data.label" else ""
        raise UserError(
            f"{key}: {split!r} has no column {column!r}: {did_you_mean(column, rows.column_names)}{without}"
        )


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))
