"""One-sentence messages for what the parser and Lightning's Trainer say about a whole command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

from distill.cli.reasons import argument_in
from distill.errors import did_you_mean, nearest, suggest

_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (.+)")
_UNKNOWN_KEY = re.compile(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'")
_GROUP = re.compile(r"Group '([^']+)' does not accept option")
_MISSING = re.compile(r"the following arguments are required: (.+)|Key \"([^\"]+)\" is required")
_MISSING_VALUE = re.compile(r"argument (?:-\w/)?(--[\w.]+):? expected one argument")
_LINKED = re.compile(r'Linked "([^"]+)" must be given via "([^"]+)"')
_NO_FILE = re.compile(r'Parser key "([^"]+)":\s*Unable to load config (.+)')
_AMBIGUOUS = re.compile(r"ambiguous option: ([^\s=]+)\S* could match (.+)")
_NO_VALUE = re.compile(r"argument (--\w+): ignored explicit argument")
_NOISE = re.compile(r"(Does not validate against|Subtypes:|Errors:|Given value|Problem with given class_path)")
_NO_GPU = "trainer.accelerator: no GPU is available: set trainer.accelerator to cpu or auto"
_TOO_MANY = re.compile(r"You requested gpu: (\[.*\])\s+But your machine only has: (\[.*\])")
_NO_ACCELERATOR = re.compile(r"No supported gpu backend|can not run on your system since the accelerator")
_NO_STRATEGY = re.compile(r"invalid strategy name: `strategy='([^']+)'`")
_NO_ACCELERATOR_NAME = re.compile(r"invalid accelerator name: `accelerator='([^']+)'`. Available names are: (.+?)\.")
_DEVICES = re.compile(r"`Trainer\(devices='?(.+?)'?\)` value is not|`devices` selected with `\w+` should be")
_EXAMPLES = {
    "data": "--data=Digits",
    "model.student": "--model.student=Timm",
    "model.optimizer": "--model.optimizer=SGD",
    "ckpt_path": "--ckpt_path=runs/run-1/checkpoints/last.ckpt",
    "output": "--output=FILE",
}


def parser_message(complaint: str, keys: Iterable[str]) -> str:
    """Rewrite an error of the parser as one sentence that names the key, what was given and what would fit.

    Args:
        complaint: the parser's message.
        keys: the dotted keys that the parser knows.
    """
    known = {key for key in keys if not key.endswith(".help") and key not in ("help", "print_config")}
    if found := _UNKNOWN_FLAG.search(complaint):
        return _unknown_flag(found[1], known)
    if found := _UNKNOWN_KEY.search(complaint):
        name = found[1] or found[2]
        group = _GROUP.search(complaint)
        return _unknown(f"{group[1]}.{name}" if group and not name.startswith(f"{group[1]}.") else name, known)
    if found := _MISSING.search(complaint):
        missing = [name.split(".", 1)[1] if name.startswith(_COMMANDS) else name for name in _names(found)]
        return f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} not given: add {_examples(missing)}"
    if found := _MISSING_VALUE.search(complaint):
        return f"{found[1].removeprefix('--')}: its value is missing: write {found[1]}=VALUE"
    if found := _AMBIGUOUS.search(complaint):
        return f"there is no option {found[1]}: {suggest(found[2].split(', '))}"
    if found := _NO_VALUE.search(complaint):
        return f"{found[1].removeprefix('--')} takes no value: write {found[1]}"
    if found := _LINKED.search(complaint):
        return f"{found[1]} is taken from {found[2]}: remove it"
    if found := _NO_FILE.search(complaint):
        return f"{found[1]}: expected its keys, or a file with them, given {found[2]}"
    lines = [line.strip(" -") for line in complaint.splitlines()]
    text = " ".join(line for line in lines if line and not _NOISE.match(line))
    text = re.sub(r'^Parser key "([^"]+)"(?: element \d+)?:\s*', r"\1: ", text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def trainer_message(complaint: str, given: Mapping[str, Any] | None = None) -> str:
    """Rewrite an error of Lightning's Trainer as one sentence that names the key.

    Args:
        complaint: the Trainer's message.
        given: the Trainer's arguments.
    """
    if found := _TOO_MANY.search(complaint):
        requested, available = (ast.literal_eval(numbers) for numbers in found.groups())
        if not available:
            return _NO_GPU
        return f"trainer.devices: GPUs {requested} were requested, but only {available} are available"
    if _NO_ACCELERATOR.search(complaint):
        return _NO_GPU
    given = given or {}
    if found := _DEVICES.search(complaint):
        return f"trainer.devices: expected a number above 0, given {found[1] or given.get('devices')}"
    if (found := _NO_STRATEGY.search(complaint)) and isinstance(given.get("strategy"), str):
        from lightning.pytorch.strategies import StrategyRegistry

        known = StrategyRegistry.available_strategies()
        return f"trainer.strategy cannot be {given['strategy']!r}: {did_you_mean(found[1], ['auto', *known])}"
    if (found := _NO_ACCELERATOR_NAME.search(complaint)) and isinstance(given.get("accelerator"), str):
        names = re.findall(r"\w+", found[2])
        return f"trainer.accelerator cannot be {found[1]!r}: {did_you_mean(found[1], names)}"
    text = " ".join(complaint.split())
    return f"trainer{argument_in(text, given)}: {text}"


def _unknown_flag(flags: str, known: set[str]) -> str:
    flag = flags.split()[0].split("=")[0]
    if not flag.startswith("-"):
        return f"{flag!r} belongs to no option: write options as --KEY=VALUE"
    if not flag.startswith("--"):
        return f"there is no option {flag}: {did_you_mean(flag, ['--config', '-c', '--help', '-h'])}"
    return _unknown(flag.removeprefix("--"), known, flag=True)


def _unknown(key: str, known: set[str], flag: bool = False) -> str:
    """Return the sentence for an unknown key: similar ones in its section, else anywhere, else all in its section."""
    parent = key.rpartition(".")[0]
    while parent and not any(name.startswith(f"{parent}.") for name in known):
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    beside = {prefix + name.removeprefix(prefix).split(".")[0] for name in known if name.startswith(prefix)}
    part = key.removeprefix(prefix)
    near = nearest(part.split(".")[0], [name.removeprefix(prefix) for name in beside])
    named = [prefix + name for name in near] or ([] if prefix else nearest(key, known))
    named = named or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    dashes = "--" if flag else ""
    shown = [f"{dashes}{name}" for name in named or beside]
    what = f"option --{key}" if flag else f"key {prefix + part.split('.')[0]!r}"
    return f"there is no {what}: {suggest(shown) if named else did_you_mean('', shown, limit=12)}"


def _names(found: re.Match[str]) -> list[str]:
    return re.split(r", | and ", found[1] or found[2])


def _examples(missing: list[str]) -> str:
    return " ".join(_EXAMPLES.get(name, f"--{name}=VALUE") for name in missing)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_COMMANDS = ("fit.", "validate.", "test.", "predict.", "check.", "plot.")
