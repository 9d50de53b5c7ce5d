"""CSV logger that continues the file of a resumed run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from distill.runs.files import write_atomic


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, extended to keep the earlier rows of a resumed run.

    Args:
        folder: folder of `metrics.csv`.
        step: optimizer step from which the run resumes. Later rows are dropped, since they will be logged again;
            0 drops all rows.
        validation_is_due: whether the run resumes before the validation that follows `step`.
    """

    def __init__(self, folder: str | Path, step: int = 0, validation_is_due: bool = False) -> None:
        super().__init__(folder, name="", version="")
        self._file = Path(folder) / ExperimentWriter.NAME_METRICS_FILE
        self._step = step
        self._validation_is_due = validation_is_due
        self._is_open = False

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, initialized with the rows to keep."""
        if self._is_open or self._step == 0:
            return cast(ExperimentWriter, super().experiment)
        self._is_open = True
        backup = self._file.with_name(self._file.name + ".before")
        source = self._file if self._file.exists() else backup  # if the last resume was killed in this method
        names: list[str] = []
        if source.exists():
            names, rows = self._rows(source)
            text = io.StringIO()
            table = csv.DictWriter(text, names)
            table.writeheader()
            table.writerows(rows)
            write_atomic(backup, text.getvalue().encode())
        writer = cast(ExperimentWriter, super().experiment)  # creating it removes the file
        if names:
            backup.replace(self._file)
            writer.metrics_keys = names
        return writer

    def _rows(self, path: Path) -> tuple[list[str], list[dict[str, Any]]]:
        """Read the header and the rows to keep."""
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            rows = [row for row in table if self._is_kept(row)]
        return list(table.fieldnames or []), rows

    def _is_kept(self, row: dict[Any, Any]) -> bool:
        if None in row or None in row.values() or not row["step"].isdigit():  # truncated
            return False
        is_repeated = self._validation_is_due and any(value for name, value in row.items() if name.startswith("val/"))
        return int(row["step"]) < self._step - (1 if is_repeated else 0)
