"""The log of a run: a row of means per epoch and rows of single steps, in one file that a resumed run continues."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from probsym_fast._files import naming_file, write_atomically
from probsym_fast.training.callbacks import validated

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """A log's complete rows, values as text, "" for missing ones; [] without a file. Raises ValueError if it is damaged."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # a truncated row has no newline
    try:
        rows = list(csv.DictReader(io.StringIO(whole.decode(), newline="")))
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values() or not row.get("step", "").isdecimal():
                raise ValueError(f"row {number} without a step or with too few or too many values")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"log: {path} must be an intact log, got {error}") from error
    return rows


def history(folder: Path) -> dict[str, dict[int, float]]:
    """Every quantity that is logged per epoch (not "step/..."): epoch -> value."""
    series: dict[str, dict[int, float]] = {}
    for row in read_rows(folder / "logs" / "metrics.csv"):
        for name, value in row.items():
            if value and name not in ("epoch", "step") and not name.startswith("step/"):
                series.setdefault(name, {})[int(row["epoch"])] = float(value)
    return series


class CsvLogger(Logger):
    """Writes logs/metrics.csv in the folder, from the first process only.

    steps: steps of the checkpoint to resume from. Rows of later steps, which will be logged again, and a truncated row are
    dropped. Nothing is written before the first row.
    """

    def __init__(self, folder: Path, steps: int = 0):
        super().__init__()
        self.path, self.steps = folder / "logs" / "metrics.csv", steps
        self._columns: list[str] = []
        self._waiting: list[Row] = []
        self._file: BinaryIO | None = None

    @property
    def name(self) -> str:
        return "logs"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._waiting.append({"step": step, **metrics})

    @rank_zero_only
    def save(self) -> None:
        """Writes the waiting rows to the file."""
        if not self._waiting:
            return
        new = sorted({name for row in self._waiting for name in row} - set(self._columns))
        if self._file is None or new:
            before = [row for row in read_rows(self.path) if self._file is not None or int(row["step"]) < self.steps]
            self._close()
            rows = [*before, *self._waiting]
            self._columns = list(dict.fromkeys(name for row in rows for name in ("epoch", "step", *sorted(row))))
            text = _text([dict(zip(self._columns, self._columns, strict=True)), *rows], self._columns)
            write_atomically(self.path, lambda file: file.write(text))
            self._file = open(self.path, "ab")
        else:
            with naming_file(self.path):
                self._file.write(_text(self._waiting, self._columns))
                self._file.flush()
        self._waiting = []

    @rank_zero_only
    def flush(self) -> None:
        """Writes the waiting rows through to the disk."""
        self.save()
        if self._file is not None:
            with naming_file(self.path):
                os.fsync(self._file.fileno())

    @property
    def experiment(self) -> CsvLogger:
        return self

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class EpochRows(Callback):
    """Logs the means of every epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stages = ("train/", "valid/") if validated(trainer) else ("train/",)  # others are from an earlier epoch
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(stages)}
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=trainer.global_step - 1)
            logger.save()


def sync_rows(trainer: L.Trainer) -> None:
    """Writes all rows so far through to the disk."""
    for logger in trainer.loggers:
        if isinstance(logger, CsvLogger | TensorBoardLogger):
            logger.experiment.flush()


def _text(rows: Iterable[Row], columns: list[str]) -> bytes:
    file = io.StringIO(newline="")
    csv.DictWriter(file, columns, restval="", lineterminator="\n").writerows(rows)
    return file.getvalue().encode()
