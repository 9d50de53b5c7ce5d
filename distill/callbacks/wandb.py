"""Reports to wandb, and its offline mode if there is no API key."""

from __future__ import annotations

import netrc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from distill.callbacks.results import Results
from distill.training.classification import ClassificationModule


class WandbReport(Callback):
    """Logs the configuration, the final results and the student to wandb, if it is a logger.

    The student is the artifact `student-<wandb run id>` with the file `student.safetensors`, as written by
    `distill export`. The id of wandb's run is saved in checkpoints, so that a resumed run continues it.

    Attributes:
        id: the id of wandb's run, or that of the run that is resumed, which may be without wandb for a while.
    """

    def __init__(self) -> None:
        self.id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the id of wandb's run."""
        return {"id": self.id}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the configuration."""
        for logger in _loggers(trainer):
            self.id = str(logger.experiment.id)
            if (results := _results(trainer)) is not None and results.configuration is not None:
                logger.log_hyperparams(results.configuration)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the results and the student."""
        for logger in _loggers(trainer):
            if (results := _results(trainer)) is not None and results.last is not None:
                best = results.best or {}
                rows = [[name, value, best.get(name)] for name, value in results.last.items()]
                logger.log_table("results", columns=["figure", "last epoch", "best epoch"], data=rows)
            assert isinstance(pl_module, ClassificationModule)
            _log_student(logger, pl_module)


def go_offline_without_a_key() -> None:
    """Switch wandb to offline mode, with a warning, if it would prompt for an API key."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    import wandb

    if wandb.run is not None:
        return
    settings = wandb.setup().settings
    has_key = settings.mode not in (None, "online") or settings.api_key or _in_netrc(settings.base_url)
    wandb.teardown()  # so that it reads the environment again when it starts
    if not has_key:
        os.environ["WANDB_MODE"] = "offline"
        warnings.warn(
            "wandb has no API key, so this run is logged offline: send it later with `wandb sync`, or set "
            "WANDB_API_KEY or WANDB_MODE to offline or disabled",
            stacklevel=2,
        )


def _in_netrc(address: str) -> bool:
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(file)).authenticators(urlsplit(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _log_student(logger: WandbLogger, module: ClassificationModule) -> None:
    import wandb
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous().clone() for name, tensor in module.student.model.state_dict().items()}
    artifact = wandb.Artifact(f"student-{logger.experiment.id}", "model", metadata={"network": module.student.name})
    with TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        artifact.add_file(str(file))
    logger.experiment.log_artifact(artifact)


def _loggers(trainer: Trainer) -> Iterator[WandbLogger]:
    """Yield wandb's loggers, on the rank that logs."""
    if trainer.is_global_zero:
        yield from (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def _results(trainer: Trainer) -> Results | None:
    found = (callback for callback in trainer.callbacks if isinstance(callback, Results))  # type: ignore[attr-defined]  # Lightning has them
    return next(found, None)
