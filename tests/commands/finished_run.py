"""What the tests know of the run that they share."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """A finished fit, and the configuration and images that belong to it."""

    config: Path
    folder: Path
    support: Path
    flat: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"
