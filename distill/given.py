"""Objects of the user's own in a run that is described by a configuration.

A configuration names such an object by its key and its class, in place of a class that would construct it; the object
itself is given beside the configuration, by `distill.fit` or `load_student`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn

from distill.configurable import Configurable, arguments_of
from distill.errors import UserError
from distill.heads import Head
from distill.networks import FeatureSource, Network
from distill.schedules import Schedule

_objects: ContextVar[Mapping[str, Any] | None] = ContextVar("objects", default=None)


@contextmanager
def given(objects: Mapping[str, Any]) -> Iterator[None]:
    """Context in which a configuration's objects are those given, by key."""
    token = _objects.set(objects)
    try:
        yield
    finally:
        _objects.reset(token)


# What a configuration names as `class_path`; the return type says where each fits.
def given_data(name: str, type: str) -> LightningDataModule:
    """Return the data module that was given as `name`."""
    found: LightningDataModule = _find(name, type)
    return found


def given_head(name: str, type: str) -> Head:
    """Return the head that was given as `name`."""
    found: Head = _find(name, type)
    return found


def given_network(name: str, type: str) -> Network:
    """Return the network that was given as `name`."""
    found: Network = _find(name, type)
    return found


def given_source(name: str, type: str) -> FeatureSource:
    """Return the source of a teacher's features that was given as `name`."""
    found: FeatureSource = _find(name, type)
    return found


def given_schedule(name: str, type: str) -> Schedule:
    """Return the schedule that was given as `name`."""
    found: Schedule = _find(name, type)
    return found


def given_module(name: str, type: str) -> nn.Module:
    """Return the module that was given as `name`."""
    found: nn.Module = _find(name, type)
    return found


def _find(name: str, type: str) -> Any:
    objects = _objects.get() or {}
    if name not in objects:
        raise _missing(name, type)
    return objects[name]


def _missing(name: str, type: str) -> UserError:
    use = "distill.fit with the same objects"
    if name.startswith("model.student"):
        use = f"distill.load_student(path, student=...), or {use}"
    return UserError(f"{name}: distill.fit was given an object of {type}, which a configuration only names: use {use}")


def require_no_objects(configuration: Any) -> None:
    """Require a configuration that names no object of the user's own.

    Raises:
        UserError: it names one.
    """
    if isinstance(configuration, Mapping):
        if str(configuration.get("class_path", "")).startswith(f"{__name__}."):
            raise _missing(**configuration["init_args"])
        for part in configuration.values():
            require_no_objects(part)


_FUNCTIONS: tuple[tuple[type, Callable[[str, str], Any]], ...] = (
    (LightningDataModule, given_data),
    (Head, given_head),
    (Network, given_network),
    (FeatureSource, given_source),
    (Schedule, given_schedule),
    (nn.Module, given_module),
)
"""The function that stands for an object of each kind, the most special kind first."""


class Writer:
    """Turns values into configuration, and keeps the objects that it can only name.

    The classes of this package become their names and arguments; objects of other classes stay objects.

    Attributes:
        objects: those objects, by key.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def write(self, value: Any, key: str) -> Any:
        """Return the configuration of a value.

        Args:
            value: numbers, texts, paths, lists and mappings of them, and objects of the kinds that configurations have.
            key: of the value, such as `model.student`.

        Raises:
            UserError: a value that fits no configuration.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return {str(name): self.write(item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.write(item, f"{key}.{number}") for number, item in enumerate(value)]
        if isinstance(value, type):
            return {"class_path": _path(value)}
        if isinstance(value, partial) and not value.args:
            return {"class_path": _path(value.func), "init_args": self.write(value.keywords, key)}
        if isinstance(value, Configurable) and type(value).__module__.partition(".")[0] == "distill":
            return {"class_path": type(value).__name__, "init_args": self.write(arguments_of(value), key)}
        if is_dataclass(value) and not isinstance(value, type):
            given = {item.name: self.write(getattr(value, item.name), f"{key}.{item.name}") for item in fields(value)}
            return {"class_path": _path(type(value)), "init_args": given} if isinstance(value, Configurable) else given
        for kind, function in _FUNCTIONS:
            if isinstance(value, kind):
                self.objects[key] = value
                return {"class_path": _path(function), "init_args": {"name": key, "type": _path(type(value))}}
        raise UserError(f"{key}: no configuration can say {value!r} of type {type(value).__name__}")


def _path(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"
