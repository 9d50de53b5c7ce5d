"""Callback that saves a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import SaveConfigCallback

from distill.runs.files import write_atomic


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
        if config.get("resume"):
            config.resume, config.ckpt_path = False, None
        return str(self.parser.dump(config, skip_none=False))
