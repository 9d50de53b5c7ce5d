"""The identity of the images that a data module yields, to compare with those of an earlier run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from typing import Any

from distill.configurable import Configurable, settings_of
from distill.data.base import ImageData
from distill.data.dataset import Split
from distill.data.sources import listed_labels, paths_of
from distill.randomness import derive_seed

SAMPLES = 16
"""Number of samples whose pixels are compared."""

_ANY = frozenset(
    {
        *("root", "path", "download", "batch_size", "num_workers", "drop_last", "draws"),
        *("repetitions", "class_balanced", "mixing", "seed", "train_views"),
    }
)
"""Arguments that change neither an image nor its number, or are compared by themselves."""


def settings_identity(data: ImageData) -> dict[str, Any]:
    """Return the class and the arguments that determine the images, as JSON values."""
    settings = {name: _plain(value) for name, value in settings_of(data).items() if name not in _ANY}
    views = {} if data.train_views == ("weak",) else {"train_views": [_view(view) for view in data.train_views]}
    return {"class": type(data).__name__, **settings, **views}


def split_identity(data: ImageData, split: Split) -> dict[str, Any]:
    """Return what identifies the images of a split, as JSON values.

    Returns:
        `images`, their number; digests of their file `names`, of their `labels`, and of the pixels of sixteen
        `samples` in their first draw, chosen by a key. What the source does not list is left out.
    """
    dataset = data.keyed_dataloader(split, ()).dataset
    source = data.used_source(split)
    count = len(source)
    digest = sha256()
    for number in range(SAMPLES if count else 0):
        image = dataset[0, derive_seed("sample", number) % count]["image"]
        digest.update(f"{tuple(image.shape)} {image.dtype};".encode())
        digest.update(image.contiguous().numpy().data)
    found: dict[str, Any] = {"images": count, "samples": digest.hexdigest()}
    if (paths := paths_of(source)) is not None and paths:
        base = os.path.commonpath([os.path.dirname(path) for path in paths])
        found["names"] = _digest(os.path.relpath(path, base) for path in paths)
    if (labels := listed_labels(source)) is not None:
        found["labels"] = _digest(labels)
    return found


def _view(view: Any) -> Any:
    return view if isinstance(view, str) else {"class": type(view).__name__, **_plain(view)}


def _digest(values: Any) -> str:
    return sha256("\n".join(map(str, values)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Configurable):
        return {"class": type(value).__name__, **_plain(settings_of(value))}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return type(value).__name__ if not isinstance(value, type) else value.__name__
