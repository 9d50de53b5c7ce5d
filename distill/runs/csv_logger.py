"""CSV logger that continues the file of a resumed run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # as its users import it

from distill.files import write_atomic


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, extended to continue the file of a resumed run exactly.

    The file changes only once there is something to log, so that a resume that is refused leaves it alone.

    Args:
        folder: folder of `metrics.csv`; may be set later, before anything is logged.
        resumed: the `state` at the checkpoint that the run resumes from. Rows that were logged later are dropped, since
            they will be logged again; without it, the file starts empty.
        resumed_step: the checkpoint's step, for a checkpoint without that state, which a run without this logger has
            saved: the rows of that step and later ones are dropped.
    """

    def __init__(
        self, folder: str | Path | None, resumed: Mapping[str, Any] | None = None, resumed_step: int | None = None
    ) -> None:
        self.folder = Path(folder or ".")
        super().__init__(self.folder, name="", version="")
        self._resumed = resumed
        self._resumed_step = resumed_step
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
        if self._is_restored or (self._resumed is None and self._resumed_step is None):
            return
        self._is_restored = True
        path = self.folder / ExperimentWriter.NAME_METRICS_FILE
        names, rows = _read(path) if path.exists() else ([], [])
        pending: list[dict[str, Any]] = []
        if self._resumed is None:
            rows = [row for row in rows if not _is_logged_from(row, cast(int, self._resumed_step))]
        else:
            logged, pending = self._resumed["rows"], self._resumed["pending"]
            if len(rows) < logged:
                rank_zero_warn(
                    f"{path} has {len(rows)} of the {logged} rows that the run had logged at its checkpoint: the "
                    "others are lost, and the curves begin after them; weights and results are not affected"
                )
            rows = [*rows[:logged], *pending]
        names = sorted({*names, *(name for row in pending for name in row)})
        self._rows = len(rows)
        if rows:
            _write(path, names, rows)
        else:
            path.unlink(missing_ok=True)
        self.experiment.metrics_keys = names if self._rows else []


class _Writer(ExperimentWriter):
    """Lightning's writer, without the removal of an existing file, and with new columns added atomically."""

    def _check_log_dir_exists(self) -> None:
        pass

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _read(path)[1])


def _is_logged_from(row: Mapping[str, Any], step: int) -> bool:
    """Return True if a row was logged after the optimizer had made `step` steps, the first of which is step 0."""
    try:
        return float(row["step"]) >= step
    except (KeyError, TypeError, ValueError):  # of a user's own row
        return False


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the columns, and the rows."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    return list(table.fieldnames or []), rows


def _write(path: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by the rows, or leave it as it is."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
