"""The part of a value that does not fit its type, and the sentence that says so.

Of a value that fits no member of a union, jsonargparse tells what every member had to say. Here it is only the judge of
single values: the way down to the wrong one is followed type by type, which gives the key as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import Namespace
from jsonargparse._common import parser_context
from jsonargparse._required import iter_required_keys

from distill.cli.named_classes import class_problem, find_class, is_abstract, with_article
from distill.errors import did_you_mean, nearest

_typehints: Any = import_module("jsonargparse._typehints")  # which has no types
_ActionTypeHint, _NestedArg = _typehints.ActionTypeHint, _typehints.NestedArg
_CALLABLES = _typehints.callable_origin_types
_SPEC = ("class_path", "init_args", "dict_kwargs")
_CERTAINTY = ("type", "choice", "class", "key")


@dataclass
class Problem:
    """A mistake in a part of a value.

    Attributes:
        key: dotted key of that part.
        kind: "type", "choice", "class" or "key"; of problems at the same depth, a later kind is the more certain one.
        depth: number of keys down to that part: of a union, the member that fits furthest is the one that was meant.
        sentence: the message of the last two kinds.
        given: the value, for the first two.
        fitting: names of the types, or the choices, that would fit.
    """

    key: str
    kind: Literal["type", "choice", "class", "key"]
    depth: int
    sentence: str = ""
    given: Any = None
    fitting: list[str] = field(default_factory=list)

    @property
    def certainty(self) -> tuple[int, int]:
        """Order in which the problems of a union's members are preferred."""
        return self.depth, _CERTAINTY.index(self.kind)

    def __str__(self) -> str:
        if self.kind == "type":
            return f"{self.key}: expected {' or '.join(self.fitting)}, given {shown(self.given)}"
        if self.kind == "choice":
            return f"{self.key} cannot be {shown(self.given, quoted=True)}: {self._choices()}"
        return self.sentence

    def _choices(self) -> str:
        return did_you_mean(str(self.given), self.fitting, limit=16)


def diagnose(parser: Any, key: str, hint: Any, value: Any, previous: Any) -> Problem | None:
    """Find what is wrong with a value.

    Args:
        parser: the parser that knows the key.
        key: dotted key of the value.
        hint: type of the value.
        value: what was given; a `NestedArg` of jsonargparse is a part of the value.
        previous: the value so far, of which a `NestedArg` changes a part.

    Returns:
        The problem; `None` if each part fits by itself.
    """
    if isinstance(value, _NestedArg):
        value = _with_part(plain(previous), value.key.split("."), value.val)
    with parser_context(parent_parser=parser, load_value_mode="yaml"):
        return _problem(key, hint, read_text(plain(value)), 0)


def members(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, or the type itself."""
    origin = get_origin(hint)
    if origin is not None and str(origin) in ("typing.Union", "<class 'types.UnionType'>"):
        for part in get_args(hint):
            yield from members(part)
    else:
        yield hint


def bases_of(hint: Any) -> tuple[type, ...]:
    """Return the classes of which a type takes subclasses by name: itself, or what a callable returns."""
    if get_origin(hint) in _CALLABLES:
        return tuple(base for part in members(get_args(hint)[-1]) for base in bases_of(part)) if get_args(hint) else ()
    is_class = inspect.isclass(hint) and _ActionTypeHint.is_subclass_typehint(hint, also_closed=True)
    return (hint,) if is_class else ()


def plain(value: Any) -> Any:
    """Return a copy of a value with mappings in place of namespaces."""
    if isinstance(value, Namespace):
        return {name: plain(part) for name, part in vars(value).items() if not name.startswith("__")}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items() if name != "__path__"}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def shown(value: Any, quoted: bool = False) -> str:
    """Return a value as a user writes it, shortened."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if value == "":
        return "an empty text"
    if isinstance(value, dict | list):
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    else:
        text = repr(value) if quoted and isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(value: Any) -> Any:
    """Return a list or mapping for a text that is one, as on the command line."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def class_field(hint: Any) -> str | None:
    """Return the name of the only required field of a dataclass if it is a class to be named."""
    if not (inspect.isclass(hint) and is_dataclass(hint)):
        return None
    required = [item for item in fields(hint) if item.default is MISSING and item.default_factory is MISSING]
    return required[0].name if len(required) == 1 else None


def _problem(key: str, hint: Any, value: Any, depth: int) -> Problem | None:
    parts = list(members(hint))
    if len(parts) > 1:
        found = []
        for part in parts:
            if (problem := _problem(key, part, value, depth)) is None:
                return None
            found.append(problem)
        return _most_certain(found)
    origin, arguments = get_origin(hint), get_args(hint)
    if bases := bases_of(hint):
        return _problem_of_class(key, hint, bases, value, depth)
    if _fits(hint, value):
        return None
    if origin is Literal:
        return Problem(key, "choice", depth, given=value, fitting=[str(choice) for choice in arguments])
    if inspect.isclass(origin) and issubclass(origin, Mapping) and isinstance(value, dict) and len(arguments) == 2:
        return _first(_problem(f"{key}.{name}", arguments[1], part, depth + 1) for name, part in value.items())
    if inspect.isclass(origin) and issubclass(origin, Iterable) and isinstance(value, list) and arguments:
        types = arguments if origin is tuple and len(arguments) == len(value) else arguments[:1] * len(value)
        items = enumerate(zip(types, value, strict=True))
        problem = _first(_problem(f"{key}[{i}]", part, item, depth + 1) for i, (part, item) in items)
        if problem is not None:
            return problem
    return Problem(key, "type", depth, given=value, fitting=[_name(hint)])


def _problem_of_class(key: str, hint: Any, bases: tuple[type, ...], value: Any, depth: int) -> Problem | None:
    if isinstance(value, bases):
        return None
    if is_dataclass(bases[0]) and isinstance(value, dict):
        if find_class(str(value.get("class_path")), bases) is bases[0]:  # as the parser writes it
            value = value.get("init_args") or {}
        if "class_path" not in value:
            return _problem_of_arguments(key, bases[0], hint, value, depth + 1)
    name = with_article(bases[0].__name__)
    if is_dataclass(bases[0]):
        name = f"a mapping with {', '.join(item.name for item in fields(bases[0]))}"
    if not isinstance(value, dict | str) or value == "":
        return Problem(key, "type", depth, given=value, fitting=[name])
    spec = {"class_path": value} if isinstance(value, str) else value
    path = spec.get("class_path")
    if path is None:
        if not is_abstract(bases[0]) and bases[0].__module__.startswith("distill") and "init_args" not in spec:
            return _problem_of_arguments(key, bases[0], hint, spec, depth + 1)
        if wrong := [name for name in spec if nearest(str(name), _SPEC)]:
            sentence = f"{key}: {wrong[0]!r} is not known: {did_you_mean(wrong[0], _SPEC)}"
        else:
            before = "" if "[" in key else f", or put --{key}=CLASS before the arguments"
            sentence = f"{key}: its class is not given: add class_path{before}"
        return Problem(key, "class", depth, sentence)
    if (inner := class_field(bases[0])) is not None and isinstance(value, dict):
        sentence = f"{key}: {with_article(bases[0].__name__)} has no class_path: write the class under {inner!r}"
        return Problem(key, "class", depth, sentence)
    if not isinstance(path, str):
        return Problem(f"{key}.class_path", "type", depth + 1, given=path, fitting=["the name of a class"])
    if (problem := class_problem(path, bases)) is not None:
        if isinstance(value, str) and not problem.is_certain:  # rather a wrong number or choice than a class
            return Problem(key, "type", depth, given=value, fitting=[name])
        return Problem(key, "class", depth, f"{key}: {problem.sentence}")
    if stray := [name for name in spec if name not in _SPEC and name != "__path__"]:
        sentence = f"{key}: {stray[0]!r} stands beside class_path: write the arguments of a class under init_args"
        return Problem(key, "key", depth + 1, sentence)
    arguments = spec.get("init_args") or {}
    if not isinstance(arguments, dict):
        return Problem(f"{key}.init_args", "type", depth + 1, given=arguments, fitting=["the arguments by name"])
    cls = find_class(path, bases)
    return None if cls is None else _problem_of_arguments(key, cls, hint, arguments, depth + 1)


def _problem_of_arguments(key: str, cls: Any, hint: Any, given: dict[str, Any], depth: int) -> Problem | None:
    """Return the first problem among the arguments of a class."""
    skip = {len(get_args(hint)) - 1} if get_origin(hint) in _CALLABLES else None
    parser = _ActionTypeHint.get_class_parser(cls, {}, skip_args=skip)
    actions = {action.dest: action for action in parser._actions if isinstance(action, _ActionTypeHint)}
    groups = {name.partition(".")[0] for name in actions if "." in name}
    for name in given:
        if name not in actions and name not in groups:
            known = did_you_mean(str(name), sorted({*actions, *groups}, key=str))
            return Problem(key, "key", depth, f"{key}: {cls.__name__} has no {str(name)!r}: {known}")
    for name in iter_required_keys(parser):
        if given.get(name) is None and name in actions and not _fits(actions[name]._typehint, None):
            return Problem(key, "key", depth, f"{key}: {cls.__name__} needs {name!r}, which is not given")
    values = ((name, value) for name, value in given.items() if name in actions)
    return _first(_problem(f"{key}.{name}", actions[name]._typehint, value, depth + 1) for name, value in values)


def _most_certain(found: list[Problem]) -> Problem:
    """Return the problem of the member of a union that was meant, or those of equal members as one."""
    best = max(found, key=lambda problem: problem.certainty)
    if best.kind in ("class", "key"):
        return best
    equal = [problem for problem in found if (problem.key, problem.kind) == (best.key, best.kind)]
    names = dict.fromkeys(name for problem in equal for name in problem.fitting)
    fitting = [name for name in names if name != "null" or len(names) == 1]
    if best.kind == "choice" and any(problem.fitting == [_name(bool)] for problem in found):
        fitting += ["true", "false"]
    return Problem(best.key, best.kind, best.depth, given=best.given, fitting=fitting)


def _first(problems: Iterable[Problem | None]) -> Problem | None:
    return next((problem for problem in problems if problem is not None), None)


def _fits(hint: Any, value: Any) -> bool:
    try:
        _typehints.adapt_typehints(deepcopy(value), hint)
    except Exception:  # whatever it says: the value does not fit
        return False
    return True


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    origin = get_origin(hint) or hint
    if inspect.isclass(origin) and origin is not str and issubclass(origin, Mapping):
        return "a mapping"
    if origin is tuple and get_args(hint):
        return f"a list of {len(get_args(hint))}"
    if inspect.isclass(origin) and origin is not str and issubclass(origin, Iterable):
        return "a list"
    if origin in _CALLABLES:
        return "the import path of a function"
    names = {bool: "true or false", str: "text", timedelta: "a duration such as 1:30:00"}
    return names.get(origin) or str(getattr(origin, "__name__", origin))


def _with_part(tree: Any, path: list[str], value: Any) -> Any:
    """Return `tree` with the part at `path` replaced; arguments of a class may leave out `init_args`."""
    name, *rest = path
    if isinstance(tree, str):
        tree = {"class_path": tree}
    tree = tree if isinstance(tree, dict) else {}
    if "class_path" in tree and name not in _SPEC:
        return {**tree, "init_args": _with_part(tree.get("init_args"), path, value)}
    return {**tree, name: _with_part(tree.get(name), rest, value) if rest else read_text(value)}
