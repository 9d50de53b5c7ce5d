"""The command line: LightningCLI with the habits of this project."""

from __future__ import annotations

import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import _typehints as jsonargparse_typehints
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

import distill.data  # makes the short names of the data modules known
import distill.heads  # and of the heads
import distill.lr_schedulers  # and of the scheduler
import distill.networks.timm
import distill.networks.wrap  # noqa: F401  # and of the networks
from distill import __version__
from distill.callbacks import RandomState
from distill.callbacks.pictures import PicturesOnce, can_plot
from distill.errors import UserError
from distill.heads import Head, shipped
from distill.module import ClassificationModule, DistillationModule
from distill.sentences import key_of, sentence


class Trainer(LightningTrainer):
    """Lightning's Trainer, which can also check a set-up without training."""

    def check(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Check the set-up alone: print networks, layers, heads and data, and stop before step 0."""
        from distill.check import print_set_up

        print_set_up(model, datamodule, self)

    def superpixels(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        output: str = "pictures",
        images: int = 4,
        ckpt_path: str | None = None,
    ) -> None:
        """Draw what the heads compare on the first validation images: superpixels and relations of both networks.

        Args:
            model: the module.
            datamodule: its data.
            output: the folder for the pictures, one for each term that can be drawn.
            images: how many images each picture shows.
            ckpt_path: a checkpoint with the student to look at; without one it is as it begins.
        """
        terms = model.terms.values() if isinstance(model, ClassificationModule) else []
        if images < 1:
            raise UserError(f"images must be at least 1, given {images}")
        if not any(can_plot(term.head) for term in terms):
            drawn = ", ".join(name for name, head in shipped().items() if head.plot is not Head.plot)
            raise UserError(f"model.heads: none of the heads has a picture; those that have are {drawn}")
        pictures = PicturesOnce(output, images)
        self.callbacks.append(pictures)  # type: ignore[attr-defined]  # Lightning's Trainer has them
        self.limit_val_batches = 1
        self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        for path in pictures.written:
            print(path)


class Parser(LightningArgumentParser):
    """Complains in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong as a `UserError`; within a class's arguments, leave it to the parser of the whole."""
        if not self.exit_on_error:
            super().error(message, ex)
        flags = [flag for action in self._actions for flag in action.option_strings]
        raise UserError(sentence(message, flags)) from ex


class SaveRun(SaveConfigCallback):
    """Keeps a run's configuration beside its results and inside its checkpoints."""

    folder: Path

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: the set-up may still be refused."""

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` into the run's folder."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(self._text())

    def on_save_checkpoint(
        self, trainer: LightningTrainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a checkpoint explain itself: `distill export` needs no other file."""
        checkpoint["distill_config"] = self._text()

    def _text(self) -> str:
        return str(self.parser.dump(self.config, skip_none=False))


class DistillCLI(LightningCLI):
    """`distill fit | validate | test | predict | check | superpixels`."""

    run_folder: Path | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own commands, `check` and `superpixels`."""
        own = {name: {"model", "datamodule"} for name in ("check", "superpixels")}
        return {**LightningCLI.subcommands(), **own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take class count and image shape from the data, and save the best and the last checkpoint."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "model.task": {"head": {"class_path": "distill.heads.cross_entropy.CrossEntropy"}, "weight": 1.0},
                "model.heads": {},  # not None: so a first head can be added from the command line
                "checkpoint.monitor": "val/top1",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder before anything is made."""
        if self.subcommand == "fit" and not self._get(self.config, "trainer").fast_dev_run:
            trainer = self._get(self.config, "trainer")
            self.run_folder = _run_folder(trainer.default_root_dir, self._get(self.config, "ckpt_path"))

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; name the key of a value that a class refuses."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser wraps what a class raises
            if (mistake := mistake_in(error)) is None:
                raise
            key = key_of(self.config[self.subcommand].as_dict(), str(mistake))
            raise (mistake.at(key) if key else mistake) from None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; leave no empty folders of a run that is refused before it writes anything."""
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            if self.run_folder is not None and not any(path.is_file() for path in self.run_folder.rglob("*")):
                shutil.rmtree(self.run_folder, ignore_errors=True)
                with suppress(OSError):  # the parent, if it was made for this run alone
                    self.run_folder.parent.rmdir()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        """Make the trainer, with a CSV logger and checkpoints in the run's folder unless configured otherwise."""
        if self._get(self.config_init, "trainer").get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(self.run_folder, name="", version="") if self.run_folder else False
        checkpoint = self._get(self.config_init, "checkpoint")
        if self.run_folder is not None:
            checkpoint.dirpath = checkpoint.dirpath or str(self.run_folder / "checkpoints")
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's Trainer has them
            if isinstance(callback, SaveRun) and self.run_folder is not None:
                callback.folder = self.run_folder
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint; unlike Lightning's, never let it override the configuration."""
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path not in (None, "best", "last", "hpc"):
            read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a run of this project, on the CPU.

    Raises:
        UserError: it is missing, broken, or of something else.
    """
    if not Path(path).is_file():
        raise UserError(f"ckpt_path: there is no file {str(path)!r}; a run keeps its checkpoints in <run>/checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"ckpt_path: {str(path)!r} is cut short or no checkpoint ({reason[:80]})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "distill" not in checkpoint:
        raise UserError(
            f"ckpt_path: {str(path)!r} holds no run of distill; weights alone are loaded with model.student.weights"
        )
    return checkpoint


def _run_folder(root: str | None, resumed: str | None) -> Path:
    """A folder that no run has used: `root`, or a numbered one where `root` is not given or is resumed from.

    Raises:
        UserError: `root` holds a run already.
    """
    if root is None:
        return _next(Path("runs"), "run")
    folder = Path(root)
    if getattr(rank_zero_only, "rank", 0) != 0:  # rank 0 looked first, and may have begun to write
        return folder
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")):
        return folder
    if resumed is not None:
        return _next(folder, "resumed")
    raise UserError(
        f"trainer.default_root_dir: {root!r} holds a run already and is not overwritten; give another folder, or "
        f"continue that run with --ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    )


def mistake_in(error: BaseException | None) -> UserError | None:
    """The user's mistake that an error was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _next(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def _drop_all_init_args(parser: object, before: Any, value: Any) -> None:
    """Swap a class without carrying over the arguments that both classes know, as jsonargparse would."""
    if before and "init_args" in before and before["class_path"] != value["class_path"]:
        before["init_args"] = type(before)()


# A weight decay meant for AdamW must not reach SGD because both have an argument of that name.
jsonargparse_typehints.discard_init_args_on_class_path_change = _drop_all_init_args


def run(args: list[str]) -> DistillCLI:
    """Run one command, given as on the command line in `args`."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    return DistillCLI(
        DistillationModule,
        LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveRun,
        trainer_class=Trainer,
        trainer_defaults={"callbacks": [RandomState()]},
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"prog": "distill", "version": __version__, "description": _DESCRIPTION},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
    )


_NOISE = (
    "LightningCLI's args parameter is intended",  # `run` is what it is intended for
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the teacher, on purpose
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    "The '.*_dataloader' does not have many workers",  # data in memory need none
    "You're using the WeightAveraging callback, but loading a checkpoint outside",  # as one does for a test
    "The number of training batches .* is smaller than the logging interval",
)

_DESCRIPTION = """Relation distillation for image models.
`distill fit --config FILE` trains, and every key of FILE can be overridden: `--model.heads.kd.weight=0.5`.
`distill fit --help` lists the keys. Two more commands: `distill export` writes the student alone,
`distill probe` classifies by its nearest neighbours."""
