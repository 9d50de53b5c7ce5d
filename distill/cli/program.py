"""The command line: LightningCLI with the habits of this project."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from distill.cli.messages import key_of, trainer_message
from distill.cli.parser import HelpFormatter, Parser, description, find_user_error, fresh_arguments_on_class_change
from distill.cli.saved_configuration import SaveConfiguration
from distill.cli.short_names import import_named_classes
from distill.cli.trainer import Trainer
from distill.errors import UserError
from distill.runs.checkpoints import AtomicCheckpointIO, latest_valid_checkpoint, read_checkpoint
from distill.runs.csv_logger import ResumableCSVLogger
from distill.runs.folder import folder_to_resume, new_folder, refuse_checkpoints_of_another, refuse_to_overwrite
from distill.runs.resume import changes
from distill.training.distillation import DistillationModule


class DistillCLI(LightningCLI):
    """The commands that Lightning's Trainer runs: `fit`, `validate`, `test`, `predict`, `check` and `plot`."""

    run_folder: Path | None = None
    taken_up: dict[str, Any] | None = None
    """The checkpoint that a run in the same folder goes on from."""

    def __init__(self, args: list[str]) -> None:
        self.command = args[0]
        super().__init__(
            DistillationModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfiguration,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [RandomState(), ExactResume(), Results(), WandbReport()]},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "distill", "version": __version__, "formatter_class": HelpFormatter},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which calls it here
        """The command that runs, alone: a parser for each of the others would cost a second at every start."""
        return {self.command: LightningCLI.subcommands().get(self.command, {"model", "datamodule"})}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take class count and image shape from the data, and save the best and the last checkpoint."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "model.task": {"head": {"class_path": "distill.heads.cross_entropy.CrossEntropy"}, "weight": 1.0},
                "model.heads": {},  # not None: so a first head can be added from the command line
            }
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        usage = f"distill {subcommand} --config FILE [OPTIONS]"
        kwargs |= {"usage": usage, "description": description(subcommand), "formatter_class": HelpFormatter}
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                action="store_true",
                help="Go on with the run in trainer.default_root_dir (or the latest runs/run-N), in its folder, from "
                "its newest whole checkpoint; begin it if there is none.",
            )
        return parser

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder before anything is made."""
        trainer = self._get(self.config, "trainer")
        if self.subcommand == "fit" and not trainer.fast_dev_run and self.run_folder is None:
            self.run_folder = new_folder(trainer.default_root_dir, self._get(self.config, "ckpt_path"))
            if (dirpath := self._get(self.config, "checkpoint").dirpath) is not None:
                refuse_checkpoints_of_another(Path(dirpath))
        for logger in _wandb_loggers(trainer.logger):
            self._settle_wandb(logger)

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; name the key of a value that a class refuses."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser wraps what a class raises
            if (mistake := find_user_error(error)) is None:
                raise
            key = key_of(self.config[self.subcommand].as_dict(), str(mistake))
            raise (mistake.at(key) if key else mistake) from None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; leave no empty folders of a run that is refused before it writes anything."""
        try:
            with _ending_well():
                super()._run_subcommand(subcommand)
        except UserError:
            if self.run_folder is not None and not any(path.is_file() for path in self.run_folder.rglob("*")):
                shutil.rmtree(self.run_folder, ignore_errors=True)
                with suppress(OSError):  # the parent, if it was made for this run alone
                    self.run_folder.parent.rmdir()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Make the trainer, with a CSV logger and checkpoints in the run's folder unless configured otherwise."""
        before = self.taken_up or {}
        if self._get(self.config_init, "trainer").get("logger") in (None, True):
            place = before.get("global_step", 0), before.get("interrupted", {}).get("validation_is_due", False)
            kwargs["logger"] = ResumableCSVLogger(self.run_folder, *place) if self.run_folder else False
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        checkpoint = self._get(self.config_init, "checkpoint")
        if self.run_folder is not None:
            checkpoint.dirpath = checkpoint.dirpath or str(self.run_folder / "checkpoints")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            if (told := trainer_message(str(error))) is None:
                raise
            raise UserError(told) from error
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        saving = next((callback for callback in callbacks if isinstance(callback, SaveConfiguration)), None)
        if saving is not None and self.run_folder is not None:
            saving.folder = self.run_folder
            for callback in callbacks:
                if isinstance(callback, Results):
                    callback.folder, callback.configuration = self.run_folder, yaml.safe_load(saving.text)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint, or find it; unlike Lightning's, never let it override the configuration."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if config.get("resume") and not config.trainer.fast_dev_run:
            self._take_up(config)
        elif path not in (None, "best", "last", "hpc"):
            read_checkpoint(path)

    def _take_up(self, config: Namespace) -> None:
        """Find the run to go on with and its newest whole checkpoint, and hold the configuration against it."""
        if config.ckpt_path is not None:
            raise UserError("resume: it finds the checkpoint by itself, but ckpt_path is given too; leave one out")
        self.run_folder = folder_to_resume(config.trainer.default_root_dir)
        checkpoints = Path(config.checkpoint.dirpath or self.run_folder / "checkpoints")
        found = latest_valid_checkpoint(checkpoints)
        refuse_to_overwrite(self.run_folder, checkpoints, resumable=found is not None)
        if found is None:
            return
        path, self.taken_up = found
        before = yaml.safe_load(self.taken_up["distill_config"])
        if config.seed_everything is True:  # "any seed": that of before
            config.seed_everything = before["seed_everything"]
        now = yaml.safe_load(self._parser("fit").dump(config, skip_none=False))
        if different := changes(before, now):
            shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
            raise UserError(
                f"resume: the run of {str(path)!r} had another configuration: {shown}; give the same, or begin another "
                "run from it with --ckpt_path in place of --resume"
            )
        config.ckpt_path = str(path)

    def _settle_wandb(self, logger: Namespace) -> None:
        """Keep wandb's files in the run's folder, go on with its run, and let it ask for nothing."""
        given = logger.init_args
        if self.run_folder is not None and given.save_dir == ".":
            given.save_dir = str(self.run_folder)
        if given.project is None and "WANDB_PROJECT" not in os.environ:
            given.project = "distill"
        if (
            self.taken_up is not None
            and given.id is None
            and given.version is None
            and "WANDB_RUN_ID" not in os.environ
        ):
            given.id = self.taken_up["callbacks"].get("WandbReport", {}).get("id")
        if not given.offline:
            go_offline_without_a_key()


@contextmanager
def _ending_well() -> Iterator[None]:
    """Tell of a full disk in one sentence, exit after SIGTERM as programs do, and let wandb finish in any case."""
    failed = True
    try:
        yield
        failed = False
    except SIGTERMException:
        raise SystemExit(128 + 15) from None
    except OSError as error:
        if (mistake := find_user_error(error)) is not None:  # a checkpoint that could not be written, and then the log
            raise mistake from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"the disk is full ({error.strerror}), what was saved before is whole: make room and go on with --resume"
        ) from error
    finally:
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def _wandb_loggers(loggers: Any) -> list[Namespace]:
    """Those of wandb among the loggers of a configuration."""
    listed = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in listed if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger")]


def run(args: list[str]) -> DistillCLI:
    """Run one of the trainer's commands.

    Args:
        args: the command and its options, as on the command line.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    import_named_classes()
    with fresh_arguments_on_class_change():
        return DistillCLI(args)


_NOISE = (
    "LightningCLI's args parameter is intended",  # `run` is what it is intended for
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the teacher, on purpose
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    "The '.*_dataloader' does not have many workers",  # data in memory need none
    "You're using the WeightAveraging callback, but loading a checkpoint outside",  # as one does for a test
    "The number of training batches .* is smaller than the logging interval",
    r"(Experiment logs|Checkpoint) directory .* exists and is not empty",  # only where a run is resumed
)
