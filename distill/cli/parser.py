"""The argument parser of all commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from jsonargparse import _typehints as jsonargparse_typehints
from lightning.pytorch.cli import LightningArgumentParser

from distill.cli.commands import COMMANDS
from distill.cli.messages import parser_message
from distill.errors import UserError


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The help of options as jsonargparse formats it, after a description as it is written."""


class Parser(LightningArgumentParser):
    """A parser that raises its errors as a `UserError` of one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError`; within a class's arguments, leave the error to the parser of the whole."""
        if not self.exit_on_error:
            super().error(message, ex)
        flags = [flag for action in self._actions for flag in action.option_strings]
        raise UserError(parser_message(message, flags)) from ex


def description(name: str) -> str:
    """The description of a command in its help."""
    command = COMMANDS[name]
    return f"{command.summary}\n\nexample:\n  {command.example}"


def command_parser(name: str) -> Parser:
    """A parser for a command that is none of the trainer's."""
    return Parser(prog=f"distill {name}", description=description(name), formatter_class=HelpFormatter)


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the user's mistake that an error was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def fresh_arguments_on_class_change() -> Iterator[None]:
    """Start a swapped class from its own defaults, within this context.

    jsonargparse would keep every argument that both classes have: a weight decay meant for AdamW would reach SGD.
    """
    before = jsonargparse_typehints.discard_init_args_on_class_path_change
    jsonargparse_typehints.discard_init_args_on_class_path_change = _drop_arguments
    try:
        yield
    finally:
        jsonargparse_typehints.discard_init_args_on_class_path_change = before


def _drop_arguments(parser: object, before: Any, value: Any) -> None:
    if before and "init_args" in before and before["class_path"] != value["class_path"]:
        before["init_args"] = type(before)()
