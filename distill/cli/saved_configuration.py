"""Callback that saves a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from distill.errors import UserError
from distill.files import write_atomic


def default_task(parser: LightningArgumentParser, args: Any, config: Namespace) -> Namespace | None:
    """Return the default of `model.task` if neither the arguments nor their files give the task, else `None`.

    Args:
        parser: of the program.
        args: the command and its options.
        config: the parsed arguments.
    """
    # Without it, the parser refuses a head by its short name.
    heads = Namespace({f"{config.subcommand}.model.heads": {}})  # type: ignore[no-untyped-call]  # jsonargparse's
    try:
        given = parser.parse_args(args, namespace=heads, defaults=False)
    except (UserError, ValueError, TypeError):  # a part of a default was given, such as a weight of the task
        return None
    model = given[config.subcommand].get("model")
    if model is not None and "task" in model:
        return None
    task: Namespace | None = config[config.subcommand].model.task
    return task


class SaveConfiguration(SaveConfigCallback):
    """Saves a run's configuration in its folder and in its checkpoints."""

    folder: Path | None = None
    """The run's folder; without one, nothing is written."""

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: the run may still be rejected."""

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` into the run's folder."""
        if trainer.is_global_zero and self.folder is not None:
            write_atomic(self.folder / "config.yaml", self.text.encode())

    def on_save_checkpoint(
        self, trainer: LightningTrainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration, so that `distill export` needs only the checkpoint."""
        checkpoint["distill_config"] = self.text

    @property
    def text(self) -> str:
        """The configuration as YAML, without `resume` and the checkpoint it found."""
        config = self.config.clone()
        if config.pop("resume", False):
            config.ckpt_path = None
        return str(self.parser.dump(config, skip_none=False))
