"""LightningCLI adapted to this project: run folders, exact resuming, and one-sentence errors."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from distill import __version__
from distill.callbacks import ExactResume, RandomState, Results, RunCheckpoint, WandbReport
from distill.callbacks.wandb import go_offline_without_a_key
from distill.cli.construction import Underway, construction, made_objects
from distill.cli.folders import refuse_unwritable
from distill.cli.jsonargparse_internals import adapted_jsonargparse, instantiating
from distill.cli.messages import trainer_message
from distill.cli.numbers import refuse_numbers
from distill.cli.parser import HelpFormatter, Parser, description, find_user_error
from distill.cli.rehearsal import BeforeFirstStep
from distill.cli.run_folder import (
    check_checkpoint,
    csv_logger,
    find_run_to_resume,
    keep_logs,
    open_run_folder,
    try_run_folder,
    wandb_id,
    write_to,
)
from distill.cli.saved_configuration import SaveConfiguration, default_task
from distill.cli.short_names import import_named_classes
from distill.cli.trainer import Trainer
from distill.cli.yaml_reader import check_files
from distill.errors import UserError
from distill.objective import TASK
from distill.runs.checkpoints import AtomicCheckpointIO
from distill.runs.folder import RunFolder, is_first_rank
from distill.training.distillation import DistillationModule


class DistillCLI(LightningCLI):
    """Command line of the commands run by the Trainer: `fit`, `validate`, `test`, `predict`, `check` and `plot`."""

    run: RunFolder | None = None
    """Folder of a training; `None` in processes that receive it from rank 0 when training begins."""
    default_task: Namespace | None = None
    """The default of `model.task` if the configuration gives none; images without labels then have no task."""
    resumed_checkpoint: dict[str, Any] | None = None
    """Content of the checkpoint that `--resume` continues from."""

    def __init__(self, args: list[str]) -> None:
        self.command = args[0]
        try:
            self._run_command(args)
        except BaseException:
            self._release(failed=True)
            raise
        self._release()

    @property
    def trains(self) -> bool:
        """Whether the command is a training that writes to a folder."""
        return self.command == "fit" and not self.config["fit"].trainer.fast_dev_run

    @property
    def run_folder(self) -> Path | None:
        """Path of a training's folder, if this process knows it."""
        return None if self.run is None else self.run.path

    def _run_command(self, args: list[str]) -> None:
        self.underway = Underway()
        before = [BeforeFirstStep(), self.underway]
        super().__init__(
            DistillationModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfiguration,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [RandomState(), ExactResume(), Results(), WandbReport(), *before]},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "distill", "version": __version__, "formatter_class": HelpFormatter},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def _release(self, failed: bool = False) -> None:
        if self.run is not None:
            self.run.release(failed)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which calls it here
        """Return only the command that runs, since building the parsers of all commands would take seconds."""
        return {self.command: LightningCLI.subcommands().get(self.command, {"model", "datamodule"})}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the model to the data, which tell class count and image shape, and add the options of checkpoints."""
        parser.link_arguments("data", "model.data", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "model.task": {"head": {"class_path": "distill.heads.cross_entropy.CrossEntropy"}, "weight": 1.0},
                "model.heads": {},  # not None, so that the command line can add a first head
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and refuse numbers that no run can have."""
        with construction("config"):
            super().parse_arguments(parser, args)
        self.default_task = default_task(parser, args, self.config)
        refuse_numbers(self.config[self.config.subcommand].as_dict(), self.config.subcommand)

    def _set_seed(self) -> None:
        with construction("seed_everything"):
            super()._set_seed()

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        usage = f"distill {subcommand} --config FILE [OPTIONS]"
        kwargs |= {"usage": usage, "description": description(subcommand), "formatter_class": HelpFormatter}
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("fit", "check"):
            parser.add_argument(
                "--resume",
                action="store_true",
                help="Check whether the run could be resumed, see `distill fit --help`."
                if subcommand == "check"
                else "Resume the run in trainer.default_root_dir (or the latest runs/run-N) from its newest valid "
                "checkpoint, in the same folder; start the run if there is none.",
            )
        return parser

    def before_instantiate_classes(self) -> None:
        """Let loggers write to the run's folder unless they are given another."""
        trainer = self._get(self.config, "trainer")
        for logger in _loggers(trainer.logger):
            if logger.get("init_args") and logger.init_args.get("save_dir") == "":
                logger.init_args.save_dir = str(self.run_folder or trainer.default_root_dir or ".")
        for logger in _wandb_loggers(trainer.logger):
            self._configure_wandb(logger)

    def instantiate_classes(self) -> None:
        """Instantiate data, model and trainer; an invalid value raises an error that names its key."""
        if self.default_task is not None:
            self._get(self.config, "model").task = "auto"
        with construction("trainer"), instantiating():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        settings = self._get(self.config, "trainer").as_dict()
        objects = made_objects(self.trainer, self.model, self.datamodule)
        with _clean_exit(), construction("trainer", objects, lambda: self.underway.begun, settings):
            super()._run_subcommand(subcommand)
        if subcommand == "check":
            try_run_folder(self.config[subcommand])
            print("The set-up is valid.")

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Instantiate the trainer; by default its CSV log and checkpoints go into the run's folder."""
        if self.default_task is not None:  # the saved configuration names the task that the run has
            self._get(self.config, "model").task = self.default_task if TASK in self.model.terms else None
        settings = self._get(self.config_init, "trainer")
        if settings.get("logger") in (None, True) and not settings.get("barebones"):
            kwargs["logger"] = csv_logger(self.run_folder, self.resumed_checkpoint) if self.trains else False
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            given = self._get(self.config, "trainer").as_dict()
            raise UserError(trainer_message(str(error), given)) from error
        assert isinstance(trainer, Trainer)
        trainer.has_run_folder, trainer.run_folder = self.trains, self.run
        trainer.load_only_given_checkpoints()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        saving = next((callback for callback in callbacks if isinstance(callback, SaveConfiguration)), None)
        for callback in callbacks:
            if isinstance(callback, Results) and saving is not None and self.trains:
                callback.configuration = yaml.safe_load(saving.text)
        if self.run is not None:
            write_to(self.run, trainer)
            keep_logs(self.resumed_checkpoint, trainer)
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> LightningTrainer:
        """Leave out the checkpoints where they are switched off, since Lightning refuses them there."""
        if config.get("barebones") or config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Check the given checkpoint, which unlike in Lightning never overrides the configuration; open the folder."""
        config = self.config[self.config.subcommand]
        if (self.trains or self.command == "check") and is_first_rank():
            refuse_unwritable(Path(config.trainer.default_root_dir or "runs"), "trainer.default_root_dir")
            if config.checkpoint.dirpath is not None:
                refuse_unwritable(Path(config.checkpoint.dirpath), "checkpoint.dirpath")
        if not self.trains or is_first_rank():  # the other ranks of a training take rank 0's
            check_checkpoint(config)
        if self.trains:
            self.run = open_run_folder(config)
            if config.resume and self.run is not None and is_first_rank():
                self.resumed_checkpoint = find_run_to_resume(
                    self.run, config, self._parser("fit"), self.default_task is not None
                )
                if config.model.task is None:
                    self.default_task = None

    def _configure_wandb(self, logger: Namespace) -> None:
        """Put wandb's files into the run's folder, resume its run, and keep it from prompting for a key."""
        settings = logger.init_args
        if self.run_folder is not None and settings.save_dir == ".":
            settings.save_dir = str(self.run_folder)
        if settings.project is None and "WANDB_PROJECT" not in os.environ:
            settings.project = "distill"
        if settings.id is None and settings.version is None and "WANDB_RUN_ID" not in os.environ:
            settings.id = wandb_id(self.resumed_checkpoint)
        if not settings.offline:
            go_offline_without_a_key()


@contextmanager
def _clean_exit() -> Iterator[None]:
    """Report a full disk in one sentence, exit with 143 after SIGTERM, and always finish wandb's run."""
    failed = True
    try:
        yield
        failed = False
    except SIGTERMException:
        raise SystemExit(128 + 15) from None
    except OSError as error:
        if (user_error := find_user_error(error)) is not None:  # raised for a checkpoint before the log failed, too
            raise user_error from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"the disk is full ({error.strerror}); earlier checkpoints are intact: free some space and continue with "
            "--resume"
        ) from error
    finally:
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def _loggers(loggers: Any) -> list[Namespace]:
    """Return the loggers in a configuration."""
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in loggers if isinstance(logger, Namespace)]


def _wandb_loggers(loggers: Any) -> list[Namespace]:
    """Return wandb's loggers in a configuration."""
    return [logger for logger in _loggers(loggers) if logger.class_path.endswith("WandbLogger")]


def run(args: list[str]) -> DistillCLI:
    """Run one of the Trainer's commands.

    Args:
        args: the command and its options, as on the command line.

    Returns:
        The finished command line, with its model, data module and trainer.
    """
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    import_named_classes()
    check_files(args[1:])
    with adapted_jsonargparse():
        return DistillCLI(args)


_IGNORED_WARNINGS = (
    "LightningCLI's args parameter is intended",  # `run` uses it as intended
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the teacher is meant to be
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # from Lightning's use of torch
    "The '.*_dataloader' does not have many workers",  # data in memory need none
    "You're using the WeightAveraging callback, but loading a checkpoint outside",  # as in a test
    "The number of training batches .* is smaller than the logging interval",  # which the module then shortens
    r"You are trying to `self\.log\(\)` but `Trainer\(barebones=True\)`",  # by barebones
    r"(Experiment logs|Checkpoint) directory .* exists and is not empty",  # of a resumed run
)
