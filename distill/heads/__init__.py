"""The loss terms: one file a method, found by its place in this folder."""

from importlib import import_module
from inspect import isabstract, isclass
from pkgutil import iter_modules
from typing import Any

from distill.heads.base import Batch, Head, LogitHead, RelationHead, RunInfo, Scope

__all__ = ["Batch", "Head", "LogitHead", "RelationHead", "RunInfo", "Scope", "shipped"]


def shipped() -> dict[str, type[Head]]:
    """The heads of this package that can be configured, by class name."""
    found: dict[str, type[Head]] = {}
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for name, item in vars(module).items():
            if isclass(item) and issubclass(item, Head) and item.__module__ == module.__name__ and not isabstract(item):
                found[name] = item
    return found


globals().update(shipped())


def __getattr__(name: str) -> Any:  # for type checkers, which do not see what is found
    raise AttributeError(f"distill.heads has no {name!r}; it has {', '.join(shipped())}")
