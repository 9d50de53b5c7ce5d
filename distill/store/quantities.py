"""Quantities of a store and the rows that it has of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from distill.errors import UserError, one_of, require_at_least

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Types of stored numbers, by name."""

RESERVED = ("state", "index.json")
"""Names in a store's folder that no split can have."""

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(?<!\.)")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no file's name on Windows


@dataclass(frozen=True)
class Quantity:
    """One tensor per image and draw.

    Args:
        name: such as `embedding` or `SeRKD.gram.3fa1c0`; also the name of a folder.
        shape: of one row; `()` is a number.
        dtype: float32, bfloat16, float16 or float64.
        key: the settings that the quantity depends on, JSON values. Tuples become lists, as a store returns them.

    Raises:
        UserError: a name that some systems refuse for a folder, a size below 1, another dtype, or a key that is not
            made of JSON values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require_safe_name("a quantity's name", self.name)
        if self.dtype not in DTYPES.values():
            raise UserError(f"quantity {self.name!r} cannot be stored as {self.dtype}: choose {', '.join(DTYPES)}")
        if not all(type(size) is int and size > 0 for size in self.shape):
            raise UserError(f"quantity {self.name!r} must have sizes of at least 1, given {self.shape}")
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "key", plain(f"the key of quantity {self.name!r}", self.key))

    @property
    def bytes(self) -> int:
        """The size of one row in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """Return all but the name as JSON values."""
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "key": dict(self.key)}

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Quantity:
        """Return the quantity that `to_json` described."""
        dtype = DTYPES[one_of("dtype", value["dtype"], DTYPES)]
        return cls(name, tuple(value["shape"]), dtype, value["key"])

    @property
    def identity(self) -> str:
        """Everything that its rows depend on besides the store's key, as canonical text."""
        return canonical({"name": self.name, **self.to_json()})


@dataclass(frozen=True)
class Rows:
    """The rows that a store has of one split, of every quantity alike.

    Rows are stored draw after draw, so that draws can be added without moving a row: only the last, shorter file is
    then written anew.

    Args:
        images: number of images.
        draws: number of draws of each image.
        per_shard: number of rows in a file; the last file may have fewer.

    Raises:
        UserError: a number below 1.
    """

    images: int
    draws: int
    per_shard: int

    def __post_init__(self) -> None:
        for name, number in (("images", self.images), ("draws", self.draws), ("per_shard", self.per_shard)):
            if type(number) is not int:
                raise UserError(f"{name} must be an integer, given {number!r}")
            require_at_least(1, **{name: number})

    def __len__(self) -> int:
        return self.images * self.draws

    @property
    def shards(self) -> int:
        """The number of files."""
        return -(-len(self) // self.per_shard)

    def row(self, index: int, draw: int) -> int:
        """Return the row of an image and draw.

        Raises:
            UserError: there is no such image or draw.
        """
        if not (0 <= index < self.images and 0 <= draw < self.draws):
            raise UserError(
                f"image {index} in draw {draw} is not stored: there are {self.images} images in {self.draws} draws, "
                "both counted from 0"
            )
        return draw * self.images + index

    def of(self, shard: int) -> range:
        """Return the rows of a file.

        Raises:
            IndexError: there is no such file.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, len(self)))


def require_safe_name(what: str, name: str) -> None:
    """Require a name that is a folder's name on any system.

    Raises:
        UserError: it is not.
    """
    if not _SAFE.fullmatch(name) or _DEVICES.fullmatch(name):
        raise UserError(
            f"{what} must be a folder's name on any system (up to 100 of the letters a-z and A-Z, digits, '_', '-' and "
            f"'.', with no '.' or '-' first and no '.' last), given {name!r}"
        )


def require_split_name(name: str) -> None:
    """Require the name of a split: a folder's on any system, and none of the store's own.

    Raises:
        UserError: it is not.
    """
    require_safe_name("a split's name", name)
    if name.lower() in RESERVED:
        raise UserError(f"a split cannot be named {name!r}, which a store has of its own")


def plain(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as it will be read from a JSON file.

    Raises:
        UserError: it holds something other than JSON values; `what` names it.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(value), default=_mapping))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} must be made of JSON values ({error})") from None
    return result


def canonical(value: Any) -> str:
    """Return JSON values as text that is the same for equal values: keys are sorted, and 1.0 is 1.

    >>> canonical({"size": (96, 96.0), "mode": "gram"})
    '{"mode":"gram","size":[96,96]}'
    """
    return json.dumps(_whole_numbers(value), sort_keys=True, separators=(",", ":"), default=_mapping)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is none")


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
