"""Argument parser shared by all commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from distill.cli.commands import COMMANDS
from distill.cli.messages import parser_message
from distill.errors import UserError


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help formatter that keeps the line breaks of the description and shows defaults like jsonargparse."""


class Parser(LightningArgumentParser):
    """Parser that raises each error as a one-sentence `UserError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError`; the nested parser of a class's arguments leaves its errors to the outer parser."""
        if not self.exit_on_error:
            super().error(message, ex)
        if (user_error := find_user_error(ex)) is not None:
            raise user_error from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        raise UserError(parser_message(message, [action.dest for action in parser._actions])) from ex


def description(name: str) -> str:
    """Return the description for a command's help."""
    command = COMMANDS[name]
    return f"{command.summary}\n\nexample:\n  {command.example}"


def command_parser(name: str) -> Parser:
    """Return a parser for a command that does not run the Trainer."""
    return Parser(prog=f"distill {name}", description=description(name), formatter_class=HelpFormatter)


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the `UserError` in an error's chain of causes, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
