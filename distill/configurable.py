"""Objects that remember the arguments they were constructed with, so that a configuration can say them."""

from __future__ import annotations

import inspect
from typing import Any, Self


class Configurable:
    """Base of the classes that a configuration may name; remembers the arguments of the constructor as they were given.

    >>> from distill.heads import RKD
    >>> arguments_of(RKD(1.0, angle=2.0))
    {'distance': 1.0, 'angle': 2.0}
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", (args, kwargs))  # before nn.Module accepts attributes
        return self


def arguments_of(value: Configurable) -> dict[str, Any]:
    """Return the arguments of the constructor by name, without those left to their defaults."""
    args, kwargs = value._arguments
    parameters = inspect.signature(type(value).__init__).parameters
    arguments = dict(inspect.signature(type(value)).bind(*args, **kwargs).arguments)
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def settings_of(value: Configurable) -> dict[str, Any]:
    """Return the arguments of the constructor by name, with the defaults of those that were not given.

    Where a constructor passes `**kwargs` on, the defaults are those of its base class's constructor.
    """
    defaults: dict[str, Any] = {}
    for cls in type(value).__mro__:
        constructor = vars(cls).get("__init__")
        parameters = {} if constructor is None else inspect.signature(constructor).parameters
        for name, parameter in parameters.items():
            if parameter.default is not parameter.empty:
                defaults.setdefault(name, parameter.default)
        if parameters and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            break
    return {**defaults, **arguments_of(value)}
