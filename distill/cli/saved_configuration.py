"""The configuration of a run, saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import SaveConfigCallback

from distill.runs.files import write_atomic


class SaveConfiguration(SaveConfigCallback):
    """Saves a run's configuration beside its results and in its checkpoints."""

    folder: Path

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: the run may still be refused."""

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Write `config.yaml` into the run's folder."""
        if trainer.is_global_zero:
            write_atomic(self.folder / "config.yaml", self.text.encode())

    def on_save_checkpoint(
        self, trainer: LightningTrainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration, so that `distill export` needs no other file."""
        checkpoint["distill_config"] = self.text

    @property
    def text(self) -> str:
        """The configuration, without what resumed the run."""
        config = self.config.clone()
        if config.get("resume"):
            config.resume, config.ckpt_path = False, None
        return str(self.parser.dump(config, skip_none=False))
