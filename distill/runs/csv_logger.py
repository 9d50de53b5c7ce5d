"""CSV logger that continues the file of a resumed run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from distill.files import write_atomic


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, extended to continue the file of a resumed run exactly.

    The file changes only once there is something to log, so that a resume that is refused leaves it alone.

    Args:
        folder: folder of `metrics.csv`; may be set later, before anything is logged.
        resumed: the `state` at the checkpoint that the run resumes from. Rows that were logged later are dropped, since
            they will be logged again; without it, the file starts empty.
    """

    def __init__(self, folder: str | Path | None, resumed: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder or ".")
        super().__init__(self.folder, name="", version="")
        self._resumed = resumed
        self._rows = 0  # logged so far, in the file or not
        self._is_restored = False

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _Writer(str(self.folder))
        return cast(ExperimentWriter, self._experiment)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row."""
        self._restore()
        self._rows += 1
        super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining rows."""
        if status == "success":
            self._restore()  # in case nothing was logged
        super().finalize(status)

    def state(self, pending: Mapping[str, float] | None) -> dict[str, Any]:
        """Flush the file to disk, and return what a checkpoint must hold so that a run resumed from it continues it.

        Args:
            pending: the row of the checkpoint's step if it is logged after the checkpoint.
        """
        self._restore()
        self.save()
        path = self.folder / ExperimentWriter.NAME_METRICS_FILE
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return {"rows": self._rows, "pending": [] if pending is None else [dict(pending)]}

    def _restore(self) -> None:
        """Bring the file to its state at the checkpoint."""
        if self._is_restored or self._resumed is None:
            return
        self._is_restored = True
        path = self.folder / ExperimentWriter.NAME_METRICS_FILE
        names: list[str] = []
        rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                table = csv.DictReader(file)
                rows = list(table)[: self._resumed["rows"]]
                names = list(table.fieldnames or [])
        pending = self._resumed["pending"]
        names = sorted({*names, *(name for row in pending for name in row)})
        self._rows = len(rows) + len(pending)
        if self._rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, names)
            writer.writeheader()
            writer.writerows([*rows, *pending])
            write_atomic(path, text.getvalue().encode())
        else:
            path.unlink(missing_ok=True)
        self.experiment.metrics_keys = names if self._rows else []


class _Writer(ExperimentWriter):
    """Lightning's writer, without the removal of an existing file."""

    def _check_log_dir_exists(self) -> None:
        pass
