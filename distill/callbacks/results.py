"""Summary of a run in one JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from distill import __version__
from distill.callbacks.checkpoint import run_checkpoint
from distill.files import write_atomic

_PACKAGES = ("torch", "lightning", "timm", "torchmetrics", "torchvision", "wandb")


class Results(Callback):
    """Writes `results.json` when training ends: metrics of the last and best epoch, and how they were obtained.

    The best epoch is determined by the checkpoints' `monitor`. Both epochs have the metrics of validation, or those of
    training in a run without validation. If the run continued after its last validation, `last` contains the step of
    that validation as `validation_step`. The state is saved in checkpoints, so that a resumed run reports the whole
    run; its wall time does not include steps that were lost between the last checkpoint and a kill.

    Args:
        folder: folder of the file; on the command line, the run's folder. Without one, nothing is written.
        configuration: configuration of the run, as a tree.

    Attributes:
        last: `epoch`, `step` and metrics of the last epoch.
        best: `epoch`, `step` and metrics of the best epoch.
        summary: content of the file, once it is written.
    """

    def __init__(self, folder: str | Path | None = None, configuration: dict[str, Any] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.configuration = configuration
        self.last: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.summary: dict[str, Any] | None = None
        self._seconds = 0.0  # before this run was resumed
        self._has_trained = False
        self._started = perf_counter()
        self._git: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics and the wall time so far."""
        return {"last": self.last, "best": self.best, "seconds": self._wall_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics and the wall time so far."""
        self.last, self.best, self._seconds = state_dict["last"], state_dict["best"], state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and read the Git revision of the working directory."""
        self._started = perf_counter()
        if self.folder is not None and trainer.is_global_zero:
            self._git = _git()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that there is something new to report."""
        self._has_trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, "val/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of an epoch in a run without validation."""
        if not trainer.enable_validation:
            self._record(trainer, "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, and say how the run ended."""
        if self.folder is None or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]  # Lightning has it
            return
        file = self.folder / "results.json"
        if not self._has_trained and file.exists():  # the run was already complete
            self.summary = json.loads(file.read_text())
            rank_zero_info(f"{self.folder}: the run had ended already; a larger trainer.max_epochs continues it")
            return
        if self.last is None or self.last["step"] != trainer.global_step:
            metrics = {name: value for name, value in (self.last or {}).items() if name not in ("epoch", "step")}
            validated = {} if self.last is None else {"validation_step": self.last["step"]}
            epoch = max(trainer.current_epoch - 1, 0)  # Lightning already counts the next epoch
            self.last = {"epoch": epoch, "step": trainer.global_step, **validated, **metrics}
        self.summary = self._summary(trainer)
        write_atomic(file, (json.dumps(self.summary, indent=2) + "\n").encode())
        rank_zero_info(f"{self.folder}: {self._told()}results.json has the figures")

    def _told(self) -> str:
        """Return the monitored figure of the last and the best epoch, as the beginning of a sentence."""
        monitor = (self.summary or {}).get("monitor")
        if self.best is None or monitor not in (self.last or {}):
            return ""
        last, best = ((figures or {})[monitor] for figures in (self.last, self.best))
        shown = "not finite" if last is None else f"{last:.4g}"
        return f"{monitor} is {shown} at the end and {best:.4g} at its best, in epoch {self.best['epoch']}; "

    def _record(self, trainer: Trainer, prefix: str) -> None:
        metrics = {
            name: _finite_or_none(float(value))
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith(prefix)
        }
        self.last = {"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics}
        monitor, mode = _monitored(trainer)
        value, best = metrics.get(monitor), (self.best or {}).get(monitor)
        if value is not None and (best is None or (value > best if mode == "max" else value < best)):
            self.best = self.last

    def _summary(self, trainer: Trainer) -> dict[str, Any]:
        monitor, mode = _monitored(trainer)
        images = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by Lightning
        return {
            "last": self.last,
            "best": self.best,
            "monitor": monitor or None,
            "mode": mode,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "wall_seconds": round(self._wall_seconds(), 3),
            "seed": None if seed is None else int(seed),
            "effective_batch": images and images * trainer.world_size * trainer.accumulate_grad_batches,
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
            "versions": {"distill": __version__, "python": platform.python_version(), **versions(_PACKAGES)},
            "git": self._git,
            "configuration": self.configuration,
        }

    def _wall_seconds(self) -> float:
        return self._seconds + perf_counter() - self._started


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package; one that is not installed is left out."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _monitored(trainer: Trainer) -> tuple[str, str]:
    checkpoint = run_checkpoint(trainer)
    return ("", "max") if checkpoint is None else (checkpoint.monitor or "", checkpoint.mode)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other numbers


def _git() -> dict[str, Any] | None:
    """Return the Git revision of the working directory and whether tracked files differ from it; `None` without Git."""
    try:
        revision, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": bool(changed)}
