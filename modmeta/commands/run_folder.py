"""What Lightning keeps in a run folder beside checkpoints: configuration, arguments and metrics, written safely."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from modmeta.errors import ModmetaError
from modmeta.files import append, drop_torn_line, write_atomically


class MetricsLogger(CSVLogger):
    """Lightning's ``metrics.csv``, of which a stopped process loses no row, and which a resumed run continues.

    Args:
        runs: the folder of all runs.
        name: of the run.
        version: of the run folder; None takes the next free one.
        resumed_at: batches before the one that a resumed run goes on with; later rows will be measured again.
    """

    def __init__(self, runs: Path, name: str, version: int | None = None, resumed_at: int | None = None) -> None:
        super().__init__(runs, name, version)
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the files."""
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir, self._resumed_at)
        return self._experiment


class SavedConfig(SaveConfigCallback):
    """Writes the resolved configuration of a run, whole or not at all."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` when the first stage begins."""
        folder = trainer.log_dir  # asked for on every rank: it is broadcast
        if self.already_saved or folder is None:
            return
        if trainer.is_global_zero:
            _make(Path(folder))
            text = self.parser.dump(self.config, skip_none=False)
            write_atomically(Path(folder, self.config_filename), text.encode())
        self.already_saved = True


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work is done.

    Raises:
        ModmetaError: naming what is in the way.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ModmetaError(f"cannot make the run folder {folder} ({nearest} is a file); work in another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ModmetaError(f"cannot make the run folder {folder} ({nearest} is read-only); work in another one")


class _MetricsWriter(ExperimentWriter):
    def __init__(self, folder: str, resumed_at: int | None) -> None:
        _make(Path(folder))
        self._resumed_at = resumed_at
        super().__init__(folder)

    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch, self.NAME_HPARAMS_FILE)
            save_hparams_to_yaml(made, self.hparams)
            write_atomically(Path(self.log_dir, self.NAME_HPARAMS_FILE), made.read_bytes())

    def save(self) -> None:
        if not self.metrics:
            return
        new = set().union(*self.metrics) - set(self.metrics_keys)
        if new:
            kept = self._rows()
            self.metrics_keys = sorted({*self.metrics_keys, *new})
            write_atomically(self.metrics_file_path, self._text([*kept, *self.metrics], header=True))
        else:
            append(self.metrics_file_path, self._text(self.metrics, header=False))
        self.metrics = []

    def _check_log_dir_exists(self) -> None:
        # Where Lightning would delete the rows of the run that is resumed.
        rows = self._rows()
        self.metrics_keys = list(rows[0]) if rows else []
        if self._resumed_at is not None and rows:
            kept = [row for row in rows if int(row["step"]) < self._resumed_at]
            write_atomically(self.metrics_file_path, self._text(kept, header=True))

    def _rows(self) -> list[dict[str, Any]]:
        lines = drop_torn_line(self.metrics_file_path)
        return list(csv.DictReader(line.decode() for line in lines))

    def _text(self, rows: list[dict[str, Any]], *, header: bool) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModmetaError(f"cannot make the run folder {folder} ({error.strerror}); work in another one") from error
