"""Argument parser shared by all commands."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from distill.cli.commands import COMMANDS
from distill.cli.messages import parser_message
from distill.cli.paths import expand_user
from distill.errors import UserError

WEIGHTS_HELP = "The weights of a run with a weight average (EMA) to take; the averaged ones by default."
"""Help for the option `weights`."""


_OF_SOME_COMMANDS = {"ckpt_path", "resume", "weights_only"}  # of those in the configuration of a run


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help formatter that keeps the line breaks of the description and shows defaults like jsonargparse."""


class Parser(LightningArgumentParser):
    """Parser that raises errors as one-sentence `UserError`s, expands `~` in paths, and takes no shortened keys."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parse the arguments, and expand `~` in them and in their configuration files."""
        return expand_user(super().parse_args(*args, **options))

    def _load_config_parser_mode(self, *args: Any, **options: Any) -> Any:
        """Load a file, without the keys that only other commands have, since a run's `config.yaml` is that of `fit`."""
        config = super()._load_config_parser_mode(*args, **options)
        known = {action.dest for action in self._actions}
        for name in _OF_SOME_COMMANDS - known if self.exit_on_error else ():  # not of a class's arguments
            config.pop(name, None)
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError`; the nested parser of a class's arguments leaves its errors to the outer parser."""
        if not self.exit_on_error:
            super().error(message, ex)
        if (user_error := find_user_error(ex)) is not None:
            raise user_error from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        raise UserError(parser_message(message, [action.dest for action in parser._actions])) from ex

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> Any:
        """Add a class's arguments; a logger's folder is not required, since it is the run's by default."""
        added = super().add_class_arguments(theclass, *args, **kwargs)
        if isinstance(theclass, type) and issubclass(theclass, Logger):
            for action in self._actions:
                if action.dest == "save_dir" and action.required:
                    action.required, action.default = False, ""
        return added


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
