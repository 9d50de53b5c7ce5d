"""User errors and the checks that raise them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


class ConstructionError(UserError):
    """A user error made of another exception, which was raised while a configuration became objects.

    The other exception is its `__cause__`.
    """


@contextmanager
def under(key: str) -> Iterator[None]:
    """Name a configuration key in all that is raised inside.

    A `UserError` gets the key in front of its message. Any other exception passes as it is, with the key as its
    attribute `configuration_key`, which the command line reads.

    Raises:
        UserError: that of the body, at `key`.
    """
    try:
        yield
    except UserError as error:
        raise error.at(key) from None
    except Exception as error:
        if not hasattr(error, "configuration_key"):
            error.configuration_key = key  # type: ignore[attr-defined]  # an exception takes any attribute
        raise


def did_you_mean(given: str, known: Iterable[str], limit: int = 8) -> str:
    """Suggest replacements for `given`: close matches if there are any, else the first known names.

    >>> did_you_mean("layr4", ["layer1", "layer4", "fc"])
    "did you mean 'layer4' or 'layer1'?"
    >>> did_you_mean("x", ["layer1", "fc"])
    "known are 'fc' and 'layer1'"
    """
    names = sorted(set(known))
    if near := nearest(given, names):
        return suggest(near)
    if not names:
        return "none is known"
    if len(names) > limit:
        return f"known are {', '.join(map(repr, names[:limit]))} and {len(names) - limit} more"
    return f"known {'is' if len(names) == 1 else 'are'} {_joined(names, 'and')}"


def nearest(given: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return up to `most` names that resemble `given`: the same in another case, else similar or longer ones."""
    names = sorted(set(known))
    folded = {name: name.lower() for name in names}
    if same := [name for name in names if folded[name] == given.lower()]:
        return [] if given in same else same[:most]
    if near := get_close_matches(given, names, n=most, cutoff=0.6):
        return near
    by_case = {lower: name for name, lower in folded.items()}
    if near := get_close_matches(given.lower(), by_case, n=most, cutoff=0.6):
        return [by_case[name] for name in near]
    return [name for name in names if given.lower() in folded[name]][:most] if len(given) > 2 else []


def suggest(names: list[str]) -> str:
    """Return the question whether one of the names was meant."""
    return f"did you mean {_joined(names, 'or')}?"


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
