"""Reading rows of a store, one sample or a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.store.quantities import Quantity, Rows
from distill.store.read_ahead import read_ahead
from distill.store.shards import UnfitShardError, map_shard, shard_path, unfit_shards

OPEN_SHARDS = 16384
"""Number of files that an object keeps mapped; Linux allows a process 65530 maps by default."""


class StoredRows:
    """The rows of one split, read through memory maps of whole files.

    A file is mapped when a process first reads from it; the pages of maps are the system's to keep or drop, so that a
    store may be larger than memory. The maps of the files read last are kept, up to `OPEN_SHARDS`. Nothing open is
    pickled, and threads and forks may share an object.

    Args:
        folder: of the store.
        split: name of the split.
        quantities: those to read.
        rows: of the split.
        key: of the store.
    """

    def __init__(self, folder: str | Path, split: str, quantities: Sequence[Quantity], rows: Rows, key: str) -> None:
        self.folder = Path(folder).expanduser()
        self.split = split
        self.quantities = tuple(quantities)
        self.rows = rows
        self.key = key
        self._shard: Callable[[Quantity, int], Tensor] = lru_cache(OPEN_SHARDS)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_shard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self.rows)

    def check(self) -> None:
        """Look at every file without reading its rows.

        Raises:
            UserError: files are missing, cut short, or others than these rows need; the message counts them and says
                what writes them anew.
        """
        self._require_none(unfit_shards(self.folder, self.split, self.quantities, self.rows, self.key))

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Tensor]:
        """Return copies of the rows of a sample, given as draw and index, by quantity.

        Raises:
            UserError: there is no such draw or image, or its file cannot be read.
        """
        draw, index = map(int, sample)
        number, offset = divmod(self.rows.row(index, draw), self.rows.per_shard)
        return {quantity.name: self._shard(quantity, number)[offset].clone() for quantity in self.quantities}

    def batch(self, draws: Sequence[int] | Tensor, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Return the rows of samples, `[B, *shape]` by quantity.

        The system is asked for all rows at once, so that a batch waits for a disk only once. Rows are then read in the
        order in which they are stored, and returned in the order given.

        Raises:
            UserError: a draw or image is not stored, or a file cannot be read.
        """
        draw, index = (torch.as_tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (draws, indices))
        if draw.shape != index.shape:
            raise ValueError(f"there must be as many draws as indices, given {len(draw)} and {len(index)}")
        wrong = (draw < 0) | (draw >= self.rows.draws) | (index < 0) | (index >= self.rows.images)
        if wrong.any():
            self.rows.row(int(index[wrong][0]), int(draw[wrong][0]))  # raises the error that names it
        stored, order = (draw * self.rows.images + index).sort()
        shards = (stored // self.rows.per_shard).tolist()
        starts = [start for start in range(len(shards)) if start == 0 or shards[start] != shards[start - 1]]
        _, *offsets = torch.tensor_split(stored % self.rows.per_shard, starts)  # nothing lies before the first
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        pieces = {
            quantity: [
                (self._shard(quantity, shards[start]), rows) for start, rows in zip(starts, offsets, strict=True)
            ]
            for quantity in self.quantities
        }
        for shard, rows in chain(*pieces.values()):
            read_ahead(shard, rows)
        return {quantity.name: _gather(quantity, pieces[quantity])[position] for quantity in self.quantities}

    def _open(self, quantity: Quantity, number: int) -> Tensor:
        try:
            return map_shard(self.folder, self.split, quantity, number, len(self.rows.of(number)), self.key)
        except UnfitShardError as error:
            self._require_none([(number, quantity, str(error))])
            raise

    def _require_none(self, unfit: Iterable[tuple[int, Quantity, str]]) -> None:
        by_reason: dict[str, list[str]] = {}
        for number, quantity, reason in unfit:
            by_reason.setdefault(reason, []).append(shard_path("", self.split, quantity, number).as_posix())
        if by_reason:
            total = self.rows.shards * len(self.quantities)
            found = ", ".join(
                f"{first!r} {reason}" + (f" (as are {len(others)} more)" if others else "")
                for reason, (first, *others) in by_reason.items()
            )
            raise UserError(
                f"store {str(self.folder)!r} lacks {sum(map(len, by_reason.values()))} of the {total} files that are "
                f"read: {found}; `distill store` with the same arguments writes what lacks and leaves the rest"
            )


def _gather(quantity: Quantity, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the rows of each shard at its offsets, one after the other."""
    gathered = torch.empty(sum(len(offsets) for _, offsets in pieces), *quantity.shape, dtype=quantity.dtype)
    start = 0
    for shard, offsets in pieces:
        stop = start + len(offsets)
        torch.index_select(shard, 0, offsets, out=gathered[start:stop])
        start = stop
    return gathered
