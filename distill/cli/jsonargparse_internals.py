"""All of jsonargparse that is private and replaced here, while a configuration is parsed and instantiated."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse._common import parent_parser

from distill.cli.construction import Escape, at_key, construct
from distill.cli.diagnosis import bases_of, class_field, diagnose, members, read_text
from distill.cli.named_classes import most_derived
from distill.cli.yaml_reader import check_file, is_file
from distill.errors import UserError

_typehints: Any = import_module("jsonargparse._typehints")  # which have no types
_signatures: Any = import_module("jsonargparse._signatures")
_actions: Any = import_module("jsonargparse._actions")
ActionTypeHint, NestedArg = _typehints.ActionTypeHint, _typehints.NestedArg
_check_type = ActionTypeHint._check_type
_instantiate = ActionTypeHint.instantiate_classes
_resolve = _typehints.resolve_class_path_by_name
_parse_value_or_config = _typehints.parse_value_or_config
_adapt_file = _typehints.adapt_subconfig_path
_get_class_instantiator = _typehints.get_class_instantiator
_sort_types = _typehints.sort_subtypes_for_union
_instantiate_group = _signatures.group_instantiate_class
_is_checking: ContextVar[bool] = ContextVar("is_checking", default=False)
_start: ContextVar[str] = ContextVar("start", default="")  # working directory, which the parser leaves for a file's
_unusable: ContextVar[tuple[UserError, ...]] = ContextVar("unusable", default=())  # files named by the value checked


@contextmanager
def adapted_jsonargparse() -> Iterator[None]:
    """Context in which jsonargparse tells the key of a mistake, and replaces classes with all their arguments.

    - A value that fits no type raises a `UserError` with the key of the part that is wrong.
    - What a class raises while it is instantiated, now or by a later call, knows the class's key.
    - A class that replaces another takes over none of its arguments. By default, it keeps those that both accept: a
      weight decay set for AdamW would reach SGD.
    - Of classes with the same short name, the one that derives from the others is taken.
    - A term may be given as its head's name alone.
    - A file that stands for a part of a configuration is checked like the configuration, and is otherwise a text.
    - A whole number stays one where a type allows both: Python keeps one order of equal unions, that of whatever was
      imported first, and jsonargparse takes the first type that fits.
    """
    replaced = [
        (_typehints, "parse_value_or_config", _parse_value_or_checked_file),
        (_typehints, "adapt_subconfig_path", _adapt_checked_file),
        (_actions, "parse_value_or_config", _parse_value_or_checked_file),
        (_typehints, "sort_subtypes_for_union", _sorted_with_int_before_float),
        (_typehints, "discard_init_args_on_class_path_change", _drop_arguments),
        (_typehints, "resolve_class_path_by_name", _resolve_most_derived),
        (_typehints, "get_class_instantiator", _instantiator_with_key),
        (_signatures, "get_class_instantiator", _instantiator_with_key),
        (_signatures, "group_instantiate_class", _instantiate_group_at_key),
        (ActionTypeHint, "_check_type", _check_type_with_key),
        (ActionTypeHint, "instantiate_classes", _instantiate_at_key),
    ]
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    start = _start.set(os.getcwd())
    for owner, name, replacement in replaced:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        _start.reset(start)
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextmanager
def instantiating() -> Iterator[None]:
    """Context that raises what a class has raised as it was, without the messages that the parser wraps around it."""
    try:
        yield
    except Escape as escape:
        raise escape.error from escape.error.__cause__


def _sorted_with_int_before_float(subtypes: Any, *given: Any) -> list[Any]:
    found = list(_sort_types(subtypes, *given))
    if int in found and float in found and found.index(float) < found.index(int):
        found.remove(int)
        found.insert(found.index(float), int)
    return found


def _check_type_with_key(self: Any, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
    if _is_checking.get():  # of a part: the whole value finds out what is wrong
        return _check_type(self, value, append, cfg, mode)
    value = _completed(self._typehint, value)
    try:
        given = deepcopy(value)
    except Exception:  # an instance as default
        given = value
    token, none = _is_checking.set(True), _unusable.set(())
    hint, parser = self._typehint, parent_parser.get()
    try:
        checked = _check_type(self, value, append, cfg, mode)
        if _is_mapping(checked) and (classes := [part for part in members(hint) if bases_of(part)]):
            problem = diagnose(parser, self.dest, classes[0], given, None)  # a class that was taken for a text
            raise UserError(str(problem or f"{self.dest}: {checked} does not fit"))
        return checked
    except UserError:
        raise
    except Exception as error:
        if given == {}:  # which jsonargparse itself tries
            raise
        if _unusable.get():
            raise _unusable.get()[0] from error
        problem = diagnose(parser, self.dest, hint, given, cfg.get(self.dest) if cfg else None)
        if problem is None:
            raise
        raise UserError(str(problem)) from error
    finally:
        _is_checking.reset(token)
        _unusable.reset(none)


class _UnusableFileError(UserError, yaml.YAMLError):  # type: ignore[misc]  # which has no types
    """An error that lets the parser go on with the name of the file as a text, which may be what the type is."""


def _parse_value_or_checked_file(value: Any, enable_path: bool = True, simple_types: bool = False) -> Any:
    if enable_path:
        _check_file(value)
    return _parse_value_or_config(value, enable_path, simple_types)


def _adapt_checked_file(value: Any, hint: Any, settings: Any) -> Any:
    if settings.get("enable_path"):
        _check_file(value)
    return _adapt_file(value, hint, settings)


def _check_file(value: Any) -> None:
    """Check the file that the parser is about to read, if a value is the name of one."""
    if not isinstance(value, str) or not is_file(value):
        return
    path = os.path.abspath(os.path.expanduser(value))
    within = os.path.relpath(path, _start.get())
    try:
        check_file(Path(path), path if os.path.isabs(value) or within.startswith("..") else within)
    except UserError as error:
        unusable = _UnusableFileError(str(error))
        _unusable.set((*_unusable.get(), unusable))
        raise unusable from error


def _completed(hint: Any, value: Any) -> Any:
    """Return a value in which terms given as the name of a head are complete."""
    for part in members(hint):
        if (name := class_field(part)) is not None and _is_name(value):
            return {name: value}
        arguments = get_args(part)
        if len(arguments) != 2 or not any(map(class_field, members(arguments[1]))):
            continue
        name = next(filter(None, map(class_field, members(arguments[1]))))
        value = read_text(value)
        if isinstance(value, Mapping) and not isinstance(value, NestedArg):
            return {key: {name: entry} if _is_name(entry) else entry for key, entry in value.items()}
        if isinstance(value, NestedArg) and "." not in value.key and _is_name(value.val):
            return NestedArg(key=f"{value.key}.{name}", val=value.val)
    return value


def _is_mapping(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.replace(".", "").replace("_", "").isalnum() and value not in ("null", "~")


def _instantiate_at_key(self: Any, value: Any) -> Any:
    """Instantiate the classes in a value, entry by entry, so that the key of each is known."""
    if isinstance(value, dict) and "class_path" not in value:
        return {
            name: _instantiate_entry(self, f"{self.dest}.{name}", {name: part})[name] for name, part in value.items()
        }
    if isinstance(value, list) and value and not _typehints._is_action_value_list(self):
        return [_instantiate_entry(self, f"{self.dest}[{i}]", [part])[0] for i, part in enumerate(value)]
    return _instantiate_entry(self, self.dest, value)


def _instantiate_entry(action: Any, key: str, value: Any) -> Any:
    with at_key(key):
        return _instantiate(action, value)


def _instantiate_group_at_key(group: Any, cfg: Any) -> None:
    with at_key(group.dest):
        _instantiate_group(group, cfg)


def _instantiator_with_key() -> Any:
    return partial(construct, at_key.current(), _get_class_instantiator())


def _resolve_most_derived(cls: Any, name: str) -> str:
    try:
        return str(_resolve(cls, name))
    except ValueError:  # several classes of that name
        bases = tuple(base for part in members(cls) for base in bases_of(part))
        found = [item for item in set(_all_subclasses(bases)) if item.__name__ == name]
        if (chosen := most_derived(found)) is None:
            raise
        return f"{chosen.__module__}.{chosen.__qualname__}"


def _all_subclasses(bases: tuple[type, ...]) -> Iterator[type]:
    for base in bases:
        yield base
        yield from _all_subclasses(tuple(base.__subclasses__()))


def _drop_arguments(parser: object, before: Any, value: Any) -> None:
    if before and "init_args" in before and before["class_path"] != value["class_path"]:
        before["init_args"] = type(before)()
