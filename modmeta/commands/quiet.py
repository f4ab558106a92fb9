"""Silences what Lightning says that helps no user of modmeta."""

from __future__ import annotations

import logging
import warnings

_LOG_LINES = (
    "💡 Tip",
    "TPU available",
    "HPU available",
    "`Trainer.fit` stopped",
    "`Trainer already configured",
)
_WARNINGS = (
    r"LightningCLI's args parameter is intended",
    r".*does not have many workers",
    r"The number of training batches .* is smaller than the logging interval",
    r".*module\(?s?\)? in eval mode",
    r".*LeafSpec",
    r"Using ModelCheckpoint with manual optimization",
    r".*treespec",
    r".*isinstance\(.*TreeSpec",
    r"Found \d+ module",
    r".*tensorboardX.*has been removed as a dependency",
    r".*Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",
    r".*Experiment logs directory .* exists and is not empty",
    # Pillow's asides on files that the decoder takes, or refuses in a line of its own.
    r"Corrupt EXIF data",
    r"Truncated File Read",
    r"Image size \(\d+ pixels\) exceeds limit",
)


def quiet() -> None:
    """Filter Lightning's advertisements and false alarms; errors and real warnings still show."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_speaks_to_the_user)


def _speaks_to_the_user(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_LOG_LINES)
