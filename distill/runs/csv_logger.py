"""The curves of a run in a CSV file, which a resumed run goes on with."""

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
    """Lightning's CSV logger, which can keep the rows of a run that is taken up.

    Args:
        folder: where `metrics.csv` lies.
        step: the optimizer step at which the run is taken up: later rows come again and are dropped; 0 drops all.
        validation_is_due: whether the run is taken up before the validation that follows that step.
    """

    def __init__(self, folder: str | Path, step: int = 0, validation_is_due: bool = False) -> None:
        super().__init__(folder, name="", version="")
        self._file = Path(folder) / ExperimentWriter.NAME_METRICS_FILE
        self._step = step
        self._validation_is_due = validation_is_due

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, which knows the rows of before."""
        if self._experiment is not None or self._step == 0:
            return cast(ExperimentWriter, super().experiment)
        aside = self._file.with_name(self._file.name + ".before")
        source = self._file if self._file.exists() else aside  # aside already if the last resume was killed here
        names: list[str] = []
        if source.exists():
            names, rows = self._rows(source)
            text = io.StringIO()
            table = csv.DictWriter(text, names)
            table.writeheader()
            table.writerows(rows)
            write_atomic(aside, text.getvalue().encode())
        writer = cast(ExperimentWriter, super().experiment)  # it removes the file
        if names:
            aside.replace(self._file)
            writer.metrics_keys = names
        return writer

    def _rows(self, path: Path) -> tuple[list[str], list[dict[str, Any]]]:
        """The header, and the whole rows from before the step."""
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            rows = [row for row in table if self._is_kept(row)]
        return list(table.fieldnames or []), rows

    def _is_kept(self, row: dict[Any, Any]) -> bool:
        if None in row or None in row.values() or not row["step"].isdigit():  # cut short
            return False
        again = self._validation_is_due and any(value for name, value in row.items() if name.startswith("val/"))
        return int(row["step"]) < self._step - (1 if again else 0)
