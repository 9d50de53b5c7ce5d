"""Comparison of nested JSON values, a sentence for each difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from distill.store.quantities import canonical


class Missing(Enum):
    """The value of a key that is not there."""

    MISSING = "missing"


MISSING = Missing.MISSING
_SHOWN = 60
"""Number of characters of a value that are shown."""


@dataclass(frozen=True)
class Difference:
    """A difference between a store and a run.

    Attributes:
        key: dotted, as in `data.image_size`; items of lists are counted from 0.
        stored: the store's value, or `MISSING`.
        given: the run's value, or `MISSING`.
    """

    key: str
    stored: Any
    given: Any

    def __str__(self) -> str:
        if self.stored is MISSING:
            return f"{self.key} is {_shown(self.given)} here, but missing in the store"
        here = "missing" if self.given is MISSING else _shown(self.given)
        return f"{self.key} is {_shown(self.stored)} in the store, but {here} here"


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[Difference]:
    """Return the differences of two nested mappings of JSON values, in the order of the stored and then the given keys.

    Tuples are lists, and 1.0 is 1. Lists of the same length are compared by item, except short lists of plain values.

    >>> [str(found) for found in differences({"data": {"image_size": 96}}, {"data": {"image_size": 128}})]
    ['data.image_size is 96 in the store, but 128 here']
    """
    return list(_differences("", stored, given))


def _differences(key: str, stored: Any, given: Any) -> Iterator[Difference]:
    if stored is not MISSING and given is not MISSING and canonical(stored) == canonical(given):
        return
    if (inner := _items(stored, given)) is None:
        yield Difference(key, stored, given)
        return
    for name, (first, second) in inner.items():
        yield from _differences(f"{key}.{name}" if key else name, first, second)


def _items(stored: Any, given: Any) -> dict[str, tuple[Any, Any]] | None:
    """Return the items of two values that are compared one by one, `None` for values that are compared as a whole."""
    if _is_list(stored) and _is_list(given):
        is_short = all(not isinstance(item, Mapping | list | tuple) for item in (*stored, *given)) and all(
            len(repr(value)) <= _SHOWN for value in (stored, given)
        )
        if is_short or len(stored) != len(given):
            return None
        return {str(number): pair for number, pair in enumerate(zip(stored, given, strict=True))}
    first, second = ({} if value is MISSING else value for value in (stored, given))
    if isinstance(first, Mapping) and isinstance(second, Mapping) and (first or second) and first is not second:
        return {name: (first.get(name, MISSING), second.get(name, MISSING)) for name in {**first, **second}}
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    size = f" ({len(value)} items)" if isinstance(value, Mapping) or _is_list(value) else ""
    return f"{text[: _SHOWN - 3]}...{size}"
