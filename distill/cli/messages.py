"""One-sentence messages for the errors of the parser and of Lightning's Trainer."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from distill.errors import did_you_mean

_GIVEN_KEY = re.compile(r"NestedArg\(key='([^']+)'")
_SECTIONS = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_NO_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_NO_IMPORT = re.compile(r"(No module named .+|module .+ has no attribute .+)")
_MISSING = re.compile(r'Key "([^"]+)" is required')
_ONE_OF = re.compile(r"Expected an? typing\.Literal(\[.+\])")
_EXPECTED = re.compile(r"Expected an? (?!dot import|path|<class 'NoneType'>)(?:<class '([^']+)'>|(\S+))", re.M)
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (\S+)")
_NO_GPU = "trainer.accelerator: no GPU is available: set trainer.accelerator to cpu or auto"
_TOO_MANY = re.compile(r"You requested gpu: (\[.*\])\s+But your machine only has: (\[.*\])")
_NO_ACCELERATOR = re.compile(r"No supported gpu backend|can not run on your system since the accelerator")
_DEVICES = re.compile(r"`Trainer\(devices='?(.+?)'?\)` value is not|`devices` selected with `\w+` should be")
_GIVEN = re.compile(r"Given value: (.+)")


def parser_message(complaint: str, flags: Iterable[str]) -> str:
    """Rewrite an error of the parser as one sentence that names the key, what was given and what would fit.

    Args:
        complaint: the parser's message, often many nested lines.
        flags: the options that the parser knows.
    """
    if found := _UNKNOWN_FLAG.search(complaint):
        flag = found[1].split("=")[0]
        return f"there is no option {flag}: {did_you_mean(flag, (f for f in flags if f.startswith('--')))}"
    key = _key(complaint)
    owner = _owner(complaint)
    if found := _NO_OPTION.search(complaint):
        key = key.removesuffix(f".{found[1]}")
        name = owner.__name__ if owner else "it"
        return f"{key}: {name} has no {found[1]!r}: {did_you_mean(found[1], _arguments(owner))}"
    if found := _NO_CLASS.search(complaint):
        return f"{key}: there is no class {found[1]!r}: {_fitting_classes(found[1], key)}"
    if found := _NO_IMPORT.search(complaint):
        return f"{key}: {found[1]}"
    given = _GIVEN.search(complaint)
    if given and (found := _ONE_OF.search(complaint)):
        return f"{key} cannot be {given[1]!r}: {did_you_mean(given[1], ast.literal_eval(found[1]))}"
    expected = sorted({first or second for first, second in _EXPECTED.findall(complaint)})
    if expected and given:
        return f"{key}: expected {' or '.join(expected)}, given {_short(given[1])}"
    text = " ".join(line.strip(" -") for line in complaint.splitlines() if line.strip())
    return re.sub(r'^Parser key "([^"]+)":\s*', r"\1: ", text)


def trainer_message(complaint: str) -> str | None:
    """Rewrite an error of Lightning's Trainer about devices as one sentence; `None` for any other error."""
    if found := _TOO_MANY.search(complaint):
        requested, available = (ast.literal_eval(numbers) for numbers in found.groups())
        if not available:
            return _NO_GPU
        return f"trainer.devices: GPUs {requested} were requested, but only {available} are available"
    if _NO_ACCELERATOR.search(complaint):
        return _NO_GPU
    if found := _DEVICES.search(complaint):
        return f"trainer.devices: expected a number above 0, given {found[1] or 'a list'}"
    return None


def key_of(config: Mapping[str, Any], message: str) -> str | None:
    """Find the configuration key that a class names in its message ("temperature must be ..., given -1")."""
    name = message.split(" ", 1)[0]
    hits = [key for key, value in _leaves(config) if key.rsplit(".", 1)[-1] == name and f"given {value}" in message]
    return hits[0].replace(".init_args.", ".") if len(hits) == 1 else None


def _key(complaint: str) -> str:
    """Return the dotted key that the complaint is about."""
    sections = _SECTIONS.findall(complaint)
    if not sections:
        return "configuration"
    key: str = sections[0]
    if found := _GIVEN_KEY.search(complaint):  # from the command line, which spells out the key within a mapping
        return f"{key}.{found[1].replace('init_args.', '')}"
    name = _entry(complaint) if len(sections) > 1 or _CLASS.search(complaint) else None
    inner = [section for section in sections[1:] if section not in key.split(".")]
    return ".".join([key, *([name] if name else []), *inner])


def _entry(complaint: str) -> str | None:
    """Return the name of the invalid entry of a mapping that was read from a file."""
    values = []
    for text in _GIVEN.findall(complaint):
        try:
            values.append(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            continue
    mappings = [value for value in values if isinstance(value, dict)]
    if len(mappings) < 2:
        return None
    return next((str(name) for name, entry in mappings[-1].items() if entry == mappings[-2]), None)


def _owner(complaint: str) -> type | None:
    """Return the innermost class that the complaint names."""
    paths = _CLASS.findall(complaint)
    if not paths:
        return None
    module, _, name = paths[-1].rpartition(".")
    owner = getattr(import_module(module), name, None)
    return owner if inspect.isclass(owner) else None


def _arguments(owner: type | None) -> list[str]:
    return [] if owner is None else [name for name in inspect.signature(owner).parameters if name != "self"]


def _fitting_classes(given: str, key: str) -> str:
    known = {cls.__name__ for base in _bases(key) for cls in _subclasses(base)}
    return did_you_mean(given, known)


def _bases(key: str) -> list[type]:
    """Return the base classes that a key accepts subclasses of."""
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from distill.data import LongTail
    from distill.heads import Head
    from distill.networks import FeatureSource, Network
    from distill.schedules import Schedule

    table: dict[str, list[type]] = {
        "head": [Head],
        "student": [Network],
        "teacher": [Network],
        "data": [LightningDataModule],
        "longtail": [LongTail],
        "optimizer": [Optimizer],
        "scheduler": [LRScheduler, Schedule],
        "callbacks": [Callback],
        "logger": [Logger],
    }
    if "teachers" in key.split("."):
        return [FeatureSource]
    return table.get(key.rsplit(".", 1)[-1], [Schedule])


def _subclasses(base: Any) -> Iterator[type]:
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _subclasses(cls)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, config


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
