"""Classes that a configuration names, with or without their module."""

from __future__ import annotations

import inspect
import sys
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from distill.cli.reasons import reason_of
from distill.errors import did_you_mean


@dataclass
class ClassProblem:
    """Why a name stands for no fitting class.

    Attributes:
        sentence: the message.
        is_certain: whether the name was meant to be a class at all: it has a dot, or resembles one.
    """

    sentence: str
    is_certain: bool = True


def class_problem(name: str, bases: tuple[type, ...]) -> ClassProblem | None:
    """Find out why a name stands for no fitting class.

    Args:
        name: a class of a dotted module, or a subclass that is imported already.
        bases: the classes of which it must be a subclass.
    """
    if "." not in name:
        known = {cls.__name__ for cls in subclasses(bases) if cls not in bases or cls.__module__.startswith("distill")}
        if name in known:
            return None
        if name in {cls.__name__ for base in bases for cls in (base, *base.__subclasses__())}:
            return ClassProblem(f"{name} is an abstract class: name one of its subclasses")
        suggestion = did_you_mean(name, known)
        return ClassProblem(f"there is no class {name!r}: {suggestion}", suggestion.startswith("did you"))
    if not all(part.isidentifier() for part in name.split(".")):
        return ClassProblem(f"{name!r} is not the name of a class", not name.replace(".", "").isdigit())
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return ClassProblem(f"there is no module {error.name!r}{_remedy(error.name)}")
        return ClassProblem(f"{module!r} cannot be imported: {reason_of(error)}")
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a module of the user raises
        return ClassProblem(f"{module!r} cannot be imported: {reason_of(error)}")
    if found is None:
        classes = [item for item, value in vars(import_module(module)).items() if inspect.isclass(value)]
        return ClassProblem(f"module {module!r} has no {attribute!r}: {did_you_mean(attribute, classes)}")
    wanted = with_article(bases[0].__name__)
    if not inspect.isclass(found):
        is_factory = callable(found) and "return" in getattr(found, "__annotations__", {})
        return None if is_factory else ClassProblem(f"{name} is not a class, expected {wanted}")
    if not issubclass(found, bases):
        is_module = any(base.__name__ == "Module" and base.__module__.startswith("torch.nn") for base in found.__mro__)
        is_network = any(base.__name__ in ("FeatureSource", "Network") for base in bases)
        remedy = f": give TorchModule, with {name} as its module" if is_module and is_network else ""
        return ClassProblem(f"{name} is not {wanted}{remedy}")
    if is_abstract(found):
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        reason = f"it does not define {', '.join(missing)}" if missing else "name one of its subclasses"
        return ClassProblem(f"{name} is abstract: {reason}")
    return None


def find_class(name: str, bases: tuple[type, ...]) -> Any:
    """Return the class that a name stands for; `None` if there is none."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        return getattr(sys.modules.get(module), attribute, None)
    found = [cls for cls in subclasses(bases) if cls.__name__ == name]
    return most_derived(found) if found else None


def most_derived(classes: list[type]) -> type | None:
    """Return the class that derives from all the others; `None` if there is none."""
    return next((cls for cls in classes if all(issubclass(cls, base) for base in classes)), None)


def subclasses(bases: tuple[type, ...]) -> Iterator[type]:
    """Yield all public subclasses that can be instantiated, and the bases themselves if they can."""
    for base in bases:
        if not is_abstract(base) and not base.__name__.startswith("_"):
            yield base
        yield from subclasses(tuple(base.__subclasses__()))


def is_abstract(cls: type) -> bool:
    """Return True for a class that only its subclasses are instances of, also if it leaves no method to them."""
    return inspect.isabstract(cls) or ABC in cls.__bases__


def with_article(name: str) -> str:
    """Return the name of a class with its article.

    >>> with_article("Head"), with_article("Optimizer"), with_article("LRScheduler")
    ('a Head', 'an Optimizer', 'an LRScheduler')
    """
    is_spelled = name[:2].isupper() and name[0] in "FHLMNRSX"  # letter by letter, with a vowel first
    return f"{'an' if is_spelled or name[0] in 'AEIO' else 'a'} {name}"


def _remedy(module: str) -> str:
    """Return the remedy for a module in the working directory, where an installed program does not look."""
    path = Path(*module.split("."))
    is_here = path.with_suffix(".py").is_file() or path.is_dir()
    return ": it is in the working directory, so set PYTHONPATH=." if is_here else ""
