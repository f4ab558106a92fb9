"""What was measured: one row per system and episode, in a file that only ever grows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from modmeta.errors import ModmetaError
from modmeta.files import append, drop_torn_line

Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Row:
    """One system on one episode.

    Attributes:
        system: name of the system in the comparison.
        domain: the episode's domain.
        shots: support images per class.
        draw: the episode's number among those of its domain and number of shots.
        ways: number of classes.
        accuracy: share of the query that is classified rightly.
        nll: mean negative log-likelihood of the query, in nats.
        parameters_updated: share of the backbone's parameters that were updated.
        backward_macs: multiply-accumulates of all backward passes.
        seconds: time to adapt, features of the frozen backbone included.
        bins: per confidence bin the count, the sum of confidences and the number of hits.
    """

    system: str
    domain: str
    shots: int
    draw: int
    ways: int
    accuracy: float
    nll: float
    parameters_updated: float
    backward_macs: int
    seconds: float
    bins: Sequence[Sequence[float]]

    @property
    def key(self) -> Key:
        """What there is one row of."""
        return self.system, self.domain, self.shots, self.draw


class RowFile:
    """Rows as JSON lines, appended as they are measured.

    A last line that a stopped process left unfinished is dropped, and its row is measured again.

    Args:
        path: the file; it need not exist.

    Raises:
        ModmetaError: if another line than the last is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: dict[Key, Row] = {}
        for number, line in enumerate(drop_torn_line(self.path), 1):
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ModmetaError(f"{self.path}, line {number} is damaged ({error}); delete that line") from error
            self.rows.setdefault(row.key, row)

    def append(self, row: Row) -> None:
        """Add a row; it is on the disk when this returns.

        Raises:
            ModmetaError: if the row holds a number that is not finite, or cannot be written.
        """
        for name, value in asdict(row).items():
            if isinstance(value, float) and not math.isfinite(value):
                where = f"system {row.system!r}, domain {row.domain!r}, {row.shots} shots, episode {row.draw}"
                raise ModmetaError(f"{where}: {name} is {value}")
        append(self.path, json.dumps(asdict(row), allow_nan=False).encode() + b"\n")
        self.rows[row.key] = row
