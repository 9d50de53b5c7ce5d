"""Checks of the configuration files on a command line, before the parser reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from distill.errors import UserError

_SUFFIXES = (".yaml", ".yml", ".json")
_MOST_NODES = 1_000_000  # a configuration has hundreds; aliases of aliases can stand for billions


def check_files(args: Sequence[str]) -> None:
    """Check every configuration file that is given by `--config`.

    Those that these name in turn, or that another option names, are checked when the parser takes them for one.

    Args:
        args: the options of a command.

    Raises:
        UserError: a file cannot be read, is no YAML, holds no keys, gives a key twice, or refers to itself.
    """
    for option, value in _options(args):
        if option in ("--config", "-c") and value and not value.lstrip().startswith("{"):  # which is given as text
            check_file(Path(value))


def is_file(value: str) -> bool:
    """Return True if the parser takes a value for the name of a configuration file, or if it was meant to be one."""
    path = os.path.expanduser(value)
    return os.path.isfile(path) or (value.endswith(_SUFFIXES) and os.path.lexists(path) and not os.path.isdir(path))


def check_file(path: Path, name: str | None = None) -> None:
    """Check a configuration file, as `check_files` does.

    Args:
        path: of the file.
        name: what messages call it, by default its path.

    Raises:
        UserError: it cannot be used.
    """
    name = name or str(path)
    root = parse_yaml(_text(path, name), name)
    if root is None:
        raise UserError(f"{name} is empty: a configuration file holds keys such as `model` and `trainer`")
    if not isinstance(root, MappingNode):
        content = "a list" if isinstance(root, SequenceNode) else f"only {_short(str(root.value))!r}"
        raise UserError(f"{name} holds {content}: a configuration file holds keys such as `model` and `trainer`")


def parse_yaml(text: str, name: str) -> Node | None:
    """Parse YAML into nodes that know their lines.

    Args:
        text: the document.
        name: what messages call it.

    Returns:
        The root; `None` if the document is empty.

    Raises:
        UserError: the syntax is wrong, a key is given twice, or a value contains itself.
    """
    try:
        root: Node | None = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _count(root, name, {}, ())
        yaml.safe_load(text)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines = text.splitlines() or [""]
        line = min(mark.line if mark else 0, len(lines) - 1)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        if lines[line].startswith("\t"):
            what = "YAML does not allow tabs for indentation"
        raise UserError(f"{name}, line {line + 1}: this is not valid YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"{name} is no text: it holds the character {error.character!r}, which YAML does not allow"
        ) from error
    except (ValueError, TypeError) as error:  # such as a date that does not exist, or a key that is a list
        raise UserError(f"{name}: this is not valid YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{name} is nested too deeply") from None
    return root


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options with their values, given as `--option=value` or as `--option value`."""
    for position, argument in enumerate(args):
        if not argument.startswith("-"):
            continue
        option, separator, value = argument.partition("=")
        if separator:
            yield option, value
        elif position + 1 < len(args):
            yield option, args[position + 1]


def _text(path: Path, name: str) -> str:
    """Read a file, which messages call `name`."""
    try:
        content = path.expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"config: there is no file {name!r}{_similar(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder, expected a file{_inside(path)}") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read: permission denied") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a null byte
        raise UserError(f"{_short(name)} cannot be read: {_reason(error)}") from None
    if b"\0" in content and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} is a binary file, expected YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name} is not encoded in UTF-8: line {line} holds the byte 0x{content[error.start]:02x}"
        ) from None


def _count(node: Node | None, name: str, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Return the number of values that a node stands for with its aliases resolved, and check its keys."""
    if node is None or not isinstance(node, MappingNode | SequenceNode):
        return 1
    if id(node) in above:
        raise UserError(f"{name}, line {node.start_mark.line + 1}: this value contains itself by an alias (`*name`)")
    if id(node) not in sizes:
        children = node.value
        if isinstance(node, MappingNode):
            _check_keys(node, name)
            children = [value for _, value in node.value]
        sizes[id(node)] = 1 + sum(_count(child, name, sizes, (*above, id(node))) for child in children)
        if sizes[id(node)] > _MOST_NODES:
            raise UserError(
                f"{name}, line {node.start_mark.line + 1}: the aliases (`*name`) stand for more than "
                f"{_MOST_NODES:,} values"
            )
    return sizes[id(node)]


def _check_keys(node: MappingNode, name: str) -> None:
    """Refuse a key that is given twice, and one that is no text, such as `on`, which YAML reads as true."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if isinstance(key, MappingNode | SequenceNode):
            raise UserError(f"{name}, line {line}: a key must be text")
        if key.value in lines:
            first = lines[key.value]
            where = f"twice in line {line}" if first == line else f"twice, in line {first} and in line {line}"
            raise UserError(f"{name}: the key {key.value!r} is given {where}: remove one of them")
        lines[key.value] = line
        if key.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
            raise UserError(
                f"{name}, line {line}: YAML does not read the key {key.value!r} as text: put it in quotation marks"
            )


def _similar(path: Path) -> str:
    """Return a hint at similar files beside a missing one."""
    from difflib import get_close_matches

    try:
        beside = [file.name for file in path.parent.iterdir() if file.suffix in _SUFFIXES]
    except OSError:
        return f"; there is no folder {str(path.parent)!r} either" if not path.parent.is_dir() else ""
    near = get_close_matches(path.name, beside, n=1, cutoff=0.75)
    return f": did you mean {str(path.parent / near[0])!r}?" if near else ""


def _inside(path: Path) -> str:
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    return f", such as {str(files[0])!r}" if files else ""


def _reason(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
