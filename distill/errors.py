"""User errors and the checks that raise them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite


class UserError(ValueError):
    """An error that the user can fix.

    The message is one sentence that names the key, what was given and what would fit. The command line prints
    it without a traceback and exits with code 2.
    """

    def at(self, key: str) -> UserError:
        """Return the same error with the configuration key `key` in front of its message."""
        return type(self)(f"{key}: {self}")


def did_you_mean(given: str, known: Iterable[str], limit: int = 8) -> str:
    """Suggest replacements for `given`: close matches if there are any, else the first known names.

    >>> did_you_mean("layr4", ["layer1", "layer4", "fc"])
    "did you mean 'layer4' or 'layer1'?"
    >>> did_you_mean("x", ["layer1", "fc"])
    "known are 'fc' and 'layer1'"
    """
    names = sorted(set(known))
    near = get_close_matches(given, names, n=3, cutoff=0.6)
    if not near:  # names in another case or containing `given`
        near = [name for name in names if given.lower() in name.lower()][:3] if len(given) > 2 else []
    if near:
        return f"did you mean {_joined(near, 'or')}?"
    if not names:
        return "none is known"
    if len(names) > limit:
        return f"known are {', '.join(map(repr, names[:limit]))} and {len(names) - limit} more"
    return f"known are {_joined(names, 'and')}"


def one_of(name: str, given: str, known: Iterable[str]) -> str:
    """Return `given` after checking that it is one of `known`.

    Raises:
        UserError: `given` is not known; the message calls it `name`.
    """
    names = list(known)
    if given not in names:
        raise UserError(f"{name} cannot be {given!r}: {did_you_mean(given, names)}")
    return given


def require_finite(**numbers: float | None) -> None:
    """Require every given number to be finite; `None` passes.

    Raises:
        UserError: a number is NaN or infinite; the message names it.
    """
    for name, number in numbers.items():
        if number is not None and not isfinite(number):
            raise UserError(f"{name} must be finite, given {number}")


def require_at_least(least: float, **numbers: float | None) -> None:
    """Require every given number to be at least `least`; `None` passes.

    >>> require_at_least(1, width=128, chunk=None)

    Raises:
        UserError: a number is too small; the message names it.
    """
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise UserError(f"{name} must be at least {least}, given {number}")


def require_above(bound: float, **numbers: float | None) -> None:
    """Require every given number to be above `bound`; `None` passes.

    Raises:
        UserError: a number is too small; the message names it.
    """
    for name, number in numbers.items():
        if number is not None and not number > bound:
            raise UserError(f"{name} must be above {bound}, given {number}")


def require_between(least: float, most: float, **numbers: float | None) -> None:
    """Require every given number to lie between `least` and `most`, inclusive; `None` passes.

    Raises:
        UserError: a number is out of range; the message names it.
    """
    for name, number in numbers.items():
        if number is not None and not least <= number <= most:
            raise UserError(f"{name} must be between {least} and {most}, given {number}")


def _joined(names: list[str], last: str) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"
