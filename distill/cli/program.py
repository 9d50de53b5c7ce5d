"""LightningCLI adapted to this project: run folders, exact resuming, and one-sentence errors."""

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
from distill.cli.construction import Underway, construction, made_objects
from distill.cli.folders import refuse_unwritable
from distill.cli.jsonargparse_internals import adapted_jsonargparse, instantiating
from distill.cli.messages import trainer_message
from distill.cli.numbers import refuse_numbers
from distill.cli.parser import HelpFormatter, Parser, description, find_user_error
from distill.cli.rehearsal import BeforeFirstStep
from distill.cli.saved_configuration import SaveConfiguration
from distill.cli.short_names import import_named_classes
from distill.cli.trainer import Trainer
from distill.cli.yaml_reader import check_files
from distill.errors import UserError
from distill.runs.checkpoints import AtomicCheckpointIO, latest_valid_checkpoint, read_checkpoint
from distill.runs.csv_logger import ResumableCSVLogger
from distill.runs.folder import folder_to_resume, new_folder, refuse_checkpoints_of_another, refuse_to_overwrite
from distill.runs.resume import changes
from distill.training.distillation import DistillationModule


class DistillCLI(LightningCLI):
    """Command line of the commands run by the Trainer: `fit`, `validate`, `test`, `predict`, `check` and `plot`."""

    run_folder: Path | None = None
    resumed_checkpoint: dict[str, Any] | None = None
    """Content of the checkpoint that `--resume` continues from."""

    def __init__(self, args: list[str]) -> None:
        self.command = args[0]
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which calls it here
        """Return only the command that runs, since building the parsers of all commands would take seconds."""
        return {self.command: LightningCLI.subcommands().get(self.command, {"model", "datamodule"})}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link class count and image shape to the data, and add the options of the checkpoints."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")
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
        refuse_numbers(self.config[self.config.subcommand].as_dict(), self.config.subcommand)

    def _set_seed(self) -> None:
        with construction("seed_everything"):
            super()._set_seed()

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        usage = f"distill {subcommand} --config FILE [OPTIONS]"
        kwargs |= {"usage": usage, "description": description(subcommand), "formatter_class": HelpFormatter}
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                action="store_true",
                help="Resume the run in trainer.default_root_dir (or the latest runs/run-N) from its newest valid "
                "checkpoint, in the same folder; start the run if there is none.",
            )
        return parser

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder before anything is instantiated."""
        trainer = self._get(self.config, "trainer")
        if self.subcommand in ("fit", "check") and not trainer.fast_dev_run:
            dirpath = self._get(self.config, "checkpoint").dirpath
            if trainer.default_root_dir is not None:
                refuse_unwritable(Path(trainer.default_root_dir), "trainer.default_root_dir")
            folder = self.run_folder or new_folder(trainer.default_root_dir, self._get(self.config, "ckpt_path"))
            refuse_unwritable(folder, "trainer.default_root_dir")
            if dirpath is not None:
                refuse_unwritable(Path(dirpath), "checkpoint.dirpath")
            if dirpath is not None and self.run_folder is None:
                refuse_checkpoints_of_another(Path(dirpath))
            if self.subcommand == "fit":
                self.run_folder = folder
        for logger in _wandb_loggers(trainer.logger):
            self._configure_wandb(logger)

    def instantiate_classes(self) -> None:
        """Instantiate data, model and trainer; an invalid value raises an error that names its key."""
        with construction("trainer"), instantiating():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; remove the empty folders of a run that is rejected before it writes anything."""
        try:
            settings = self._get(self.config, "trainer").as_dict()
            made = made_objects(self.trainer, self.model, self.datamodule)
            with _clean_exit(), construction("trainer", made, lambda: self.underway.begun, settings):
                super()._run_subcommand(subcommand)
        except UserError:
            if self.run_folder is not None and not any(path.is_file() for path in self.run_folder.rglob("*")):
                shutil.rmtree(self.run_folder, ignore_errors=True)
                with suppress(OSError):  # the parent too, unless it holds other runs
                    self.run_folder.parent.rmdir()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Instantiate the trainer; by default its CSV log and checkpoints go into the run's folder."""
        checkpoint_content = self.resumed_checkpoint or {}
        if self._get(self.config_init, "trainer").get("logger") in (None, True):
            step = checkpoint_content.get("global_step", 0)
            is_due = checkpoint_content.get("interrupted", {}).get("validation_is_due", False)
            kwargs["logger"] = ResumableCSVLogger(self.run_folder, step, is_due) if self.run_folder else False
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
            given = self._get(self.config, "trainer").as_dict()
            raise UserError(trainer_message(str(error), given)) from error
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's Trainer has them
        saving = next((callback for callback in callbacks if isinstance(callback, SaveConfiguration)), None)
        if saving is not None and self.run_folder is not None:
            saving.folder = self.run_folder
            for callback in callbacks:
                if isinstance(callback, Results):
                    callback.folder, callback.configuration = self.run_folder, yaml.safe_load(saving.text)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Check or find the checkpoint; unlike in Lightning, it never overrides the configuration."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if config.get("resume") and not config.trainer.fast_dev_run:
            self._find_run_to_resume(config)
        elif path not in (None, "best", "last", "hpc"):
            read_checkpoint(path)

    def _find_run_to_resume(self, config: Namespace) -> None:
        """Find the run to resume and its newest valid checkpoint, and compare its configuration with the given one."""
        if config.ckpt_path is not None:
            raise UserError("resume: it finds the checkpoint itself, but ckpt_path is given too; remove one of them")
        self.run_folder = folder_to_resume(config.trainer.default_root_dir)
        checkpoints = Path(config.checkpoint.dirpath or self.run_folder / "checkpoints")
        found = latest_valid_checkpoint(checkpoints)
        refuse_to_overwrite(self.run_folder, checkpoints, resumable=found is not None)
        if found is None:
            return
        path, self.resumed_checkpoint = found
        previous = yaml.safe_load(self.resumed_checkpoint["distill_config"])
        if config.seed_everything is True:  # any seed: keep the previous one
            config.seed_everything = previous["seed_everything"]
        current = yaml.safe_load(self._parser("fit").dump(config, skip_none=False))
        if different := changes(previous, current):
            shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
            raise UserError(
                f"resume: the run of {str(path)!r} had a different configuration: {shown}; give the same, or start a "
                "new run from this checkpoint with --ckpt_path instead of --resume"
            )
        config.ckpt_path = str(path)

    def _configure_wandb(self, logger: Namespace) -> None:
        """Put wandb's files into the run's folder, resume its run, and keep it from prompting for a key."""
        settings = logger.init_args
        if self.run_folder is not None and settings.save_dir == ".":
            settings.save_dir = str(self.run_folder)
        if settings.project is None and "WANDB_PROJECT" not in os.environ:
            settings.project = "distill"
        if (
            self.resumed_checkpoint is not None
            and settings.id is None
            and settings.version is None
            and "WANDB_RUN_ID" not in os.environ
        ):
            settings.id = self.resumed_checkpoint["callbacks"].get("WandbReport", {}).get("id")
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


def _wandb_loggers(loggers: Any) -> list[Namespace]:
    """Return wandb's loggers in a configuration."""
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in loggers if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger")]


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
    "The number of training batches .* is smaller than the logging interval",
    r"(Experiment logs|Checkpoint) directory .* exists and is not empty",  # of a resumed run
)
