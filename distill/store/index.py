"""The index of a store: what its rows are, of what they were computed, and which there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from distill.errors import UserError, one_of
from distill.store.differences import Difference, differences
from distill.store.quantities import Quantity, Rows, canonical, plain, require_split_name
from distill.store.writing import write_file

INDEX = "index.json"
"""Name of the index in a store's folder."""

FORMAT = 1
"""Number of this format."""

NOT_IN_KEY = ("versions", "command", "taps", "network", "device")
"""Keys at the top of an identity that say how rows came about and do not change them."""


@dataclass(frozen=True)
class StoreIndex:
    """The description of a store.

    Args:
        identity: nested JSON values on which all rows depend, such as the teacher's and the data's, and those of
            `NOT_IN_KEY`.
        splits: rows by split.
        quantities: by name, those of all splits.
        contents: for each split, the names of its quantities; by default all.
        images: for each split, what identifies its images.

    Raises:
        UserError: an identity that is not made of JSON values, a split whose name no folder can have, names that
            differ only in case, or contents of other splits or quantities.
    """

    identity: Mapping[str, Any]
    splits: Mapping[str, Rows]
    quantities: Mapping[str, Quantity]
    contents: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in self.splits:
            require_split_name(split)
        if not {*self.contents} <= {*self.splits} or not {*chain(*self.contents.values())} <= {*self.quantities}:
            raise UserError("the contents of a store must be of its splits and name its quantities")
        contents = {split: tuple(self.contents.get(split, self.quantities)) for split in self.splits}
        object.__setattr__(self, "contents", contents)
        object.__setattr__(self, "images", {split: dict(self.images.get(split, {})) for split in self.splits})
        object.__setattr__(self, "identity", plain("the identity of a store", self.identity))
        for what, names in (("split", self.splits), ("quantity", self.quantities)):
            folded: dict[str, str] = {}
            for name in names:
                if (known := folded.setdefault(name.lower(), name)) != name:
                    raise UserError(f"{what} {name!r} cannot be stored beside {known!r}: some systems ignore case")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that differ for another identity, except in what `NOT_IN_KEY` names."""
        rows = {name: value for name, value in self.identity.items() if name not in NOT_IN_KEY}
        return sha256(canonical(rows).encode()).hexdigest()[:16]

    def quantities_of(self, split: str) -> list[Quantity]:
        """Return the quantities of a split.

        Raises:
            UserError: the store has no such split.
        """
        return [self.quantities[name] for name in self.contents[one_of("split", split, self.splits)]]

    def differences(self, identity: Mapping[str, Any]) -> list[Difference]:
        """Return the differences between the stored identity and another, as far as rows depend on it."""
        stored, given = (
            {name: value for name, value in values.items() if name not in NOT_IN_KEY}
            for values in (self.identity, plain("the identity", identity))
        )
        return differences(stored, given)

    def described(self, identity: Mapping[str, Any]) -> StoreIndex:
        """Return an index whose identity says what `NOT_IN_KEY` names as another does; taps are added."""
        taps = {**self.identity.get("taps", {}), **identity.get("taps", {})}
        descriptive = {name: value for name, value in identity.items() if name in NOT_IN_KEY}
        return replace(self, identity={**self.identity, **descriptive, "taps": taps})

    def adding(
        self, split: str, rows: Rows, quantities: Sequence[Quantity], images: Mapping[str, Any] | None = None
    ) -> StoreIndex:
        """Return an index with further draws or quantities of a split, or with a further split.

        Args:
            split: a stored or a new one.
            rows: of the split. A stored split keeps its draws if it has more.
            quantities: stored or new ones.
            images: what identifies the images.

        Raises:
            UserError: the stored split has another number of images or of rows in a file, or a quantity of the same
                name is another one.
        """
        before = self.splits.get(split, rows)
        for name in ("images", "per_shard"):
            stored, given = getattr(before, name), getattr(rows, name)
            if stored != given:
                raise UserError(f"{name} of {split!r} is {stored} in the store, but {given} here")
        for quantity in quantities:
            known = self.quantities.get(quantity.name, quantity)
            if known.identity != quantity.identity:
                found = "; ".join(map(str, differences(known.to_json(), quantity.to_json())))
                raise UserError(f"quantity {quantity.name!r} is another one in the store ({found})")
        new = {quantity.name: quantity for quantity in quantities}
        return replace(
            self,
            splits={**self.splits, split: replace(rows, draws=max(before.draws, rows.draws))},
            quantities={**self.quantities, **new},
            contents={**self.contents, split: tuple(dict.fromkeys([*self.contents.get(split, ()), *new]))},
            images={**self.images, split: images or self.images.get(split, {})},
        )

    @classmethod
    def read(cls, folder: str | Path) -> StoreIndex:
        """Read the index of a store.

        Raises:
            UserError: there is no store in the folder, its index is damaged, or a later version wrote it.
        """
        path = Path(folder).expanduser() / INDEX
        where = f"store {str(folder)!r}"
        try:
            content = json.loads(path.read_bytes())
            number = content["format"]
            if type(number) is int and number > FORMAT:
                raise UserError(f"{where} has format {number}, and this version reads {FORMAT}: update distill")
            if number != FORMAT:
                raise UserError(f"its format is {number!r}")
            contents = {split: value.pop("quantities") for split, value in content["splits"].items()}
            images = {split: value.pop("identity", {}) for split, value in content["splits"].items()}
            return cls(
                identity=content["identity"],
                splits={split: Rows(**value) for split, value in content["splits"].items()},
                quantities={name: Quantity.from_json(name, value) for name, value in content["quantities"].items()},
                contents=contents,
                images=images,
            )
        except OSError as error:
            raise UserError(f"{where} {_instead_of_a_store(path, error)}") from None
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, UserError) and str(error).startswith(where):
                raise
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{where} has a damaged {INDEX} ({reason})") from None

    def write(self, folder: str | Path) -> None:
        """Write the index into a folder, which is created if needed; an old one is replaced atomically.

        Raises:
            UserError: it cannot be written; an old one stays.
        """
        content = {
            "format": FORMAT,
            "splits": {
                split: {
                    **vars(rows),
                    "quantities": list(self.contents[split]),
                    "identity": self.images[split],
                }
                for split, rows in self.splits.items()
            },
            "quantities": {name: quantity.to_json() for name, quantity in self.quantities.items()},
            "identity": self.identity,
        }
        write_file(Path(folder).expanduser() / INDEX, (json.dumps(content, indent=2) + "\n").encode())


def _instead_of_a_store(path: Path, error: OSError) -> str:
    if path.parent.is_dir():
        if isinstance(error, FileNotFoundError):
            return f"has no {INDEX}, which `distill store` writes first: it is another folder"
        return f"cannot be read ({error.strerror or error})"
    return "is not a folder" if path.parent.exists() else "does not exist"
