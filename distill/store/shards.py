"""Files of a store's rows: writing one, mapping one, and finding those that lack."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill.store.quantities import Quantity, Rows, canonical, require_split_name
from distill.store.writing import write_file

_ROWS = "rows"
"""Name of the tensor in a file."""
_DESCRIPTION = "distill"
"""Name of the description in a file's header."""


class UnfitShardError(Exception):
    """A file that cannot be read as the shard it should be; the message is the predicate of a sentence."""


def write_shard(folder: str | Path, split: str, quantity: Quantity, number: int, rows: Tensor, key: str) -> None:
    """Write the rows of one file, atomically: `<folder>/<split>/<quantity>/<number>.safetensors`.

    Args:
        folder: of the store.
        split: name of the split.
        quantity: the quantity, whose identity is stored with the rows.
        number: of the file, from 0.
        rows: `[N, *quantity.shape]` of the quantity's dtype, on any device.
        key: of the store.

    Raises:
        ValueError: the rows have another shape or dtype than the quantity.
        UserError: the file cannot be written, as on a full disk; nothing is left of it, and an old one stays.
    """
    if rows.shape[1:] != quantity.shape or rows.dtype != quantity.dtype or len(rows) == 0:
        raise ValueError(
            f"rows of {quantity.name!r} must have the shape [N, {', '.join(map(str, quantity.shape))}] and type "
            f"{quantity.dtype}, given {list(rows.shape)} and {rows.dtype}"
        )
    metadata = _metadata(split, quantity, number, len(rows), key)
    # As one entry, since the library writes several in a random order, and equal rows are to be equal files.
    content = save({_ROWS: rows.detach().cpu().contiguous()}, metadata={_DESCRIPTION: canonical(metadata)})
    write_file(shard_path(folder, split, quantity, number), content)


def missing_shards(folder: str | Path, split: str, quantity: Quantity, rows: Rows, key: str) -> list[int]:
    """Return the numbers of files that are to be written.

    These are absent, cut short, unreadable, of another key, or have another number of rows.
    """
    return [number for number, _, _ in unfit_shards(folder, split, [quantity], rows, key)]


def unfit_shards(
    folder: str | Path, split: str, quantities: Sequence[Quantity], rows: Rows, key: str
) -> Iterator[tuple[int, Quantity, str]]:
    """Yield the number, quantity and fault of each file that is not as it should be."""
    for quantity in quantities:
        for number in range(rows.shards):
            try:
                map_shard(folder, split, quantity, number, len(rows.of(number)), key)
            except UnfitShardError as error:
                yield number, quantity, str(error)


def map_shard(folder: str | Path, split: str, quantity: Quantity, number: int, count: int, key: str) -> Tensor:
    """Return the rows of a file as a memory map, which outlives the open file.

    Raises:
        UnfitShardError: the file is not these rows.
    """
    path = shard_path(folder, split, quantity, number)
    try:
        with safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get(_DESCRIPTION, "{}")
            rows: Tensor = file.get_tensor(_ROWS)
    except SafetensorError:
        raise UnfitShardError("is cut short or damaged") from None
    except OSError as error:
        raise UnfitShardError("cannot be read" if os.path.lexists(path) else "is missing") from error
    metadata: dict[str, str] = json.loads(description)
    expected = _metadata(split, quantity, number, count, key)
    if {**metadata, "rows": ""} != {**expected, "rows": ""}:
        raise UnfitShardError("is of another teacher, other data or other settings")
    if metadata != expected:
        raise UnfitShardError("has another number of rows")
    if rows.shape != (count, *quantity.shape) or rows.dtype != quantity.dtype:
        raise UnfitShardError("is cut short or damaged")
    return rows


def _metadata(split: str, quantity: Quantity, number: int, count: int, key: str) -> dict[str, str]:
    """Return the description in a file's header, so that no file is taken for another, even if it is renamed."""
    return {"key": key, "split": split, "quantity": quantity.identity, "shard": str(number), "rows": str(count)}


def shard_path(folder: str | Path, split: str, quantity: Quantity, number: int) -> Path:
    """Return the path of a file."""
    require_split_name(split)
    return Path(folder).expanduser() / split / quantity.name / f"{number:05d}.safetensors"
