"""One pass over a folder: what every file is, and a compact description to compare images by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.transforms.v2 import functional as F

from modmeta.data.audit.descriptor import LENGTH, SIZE, describe
from modmeta.data.decode import printable
from modmeta.data.inspect import IMAGE_SIZE, WORKERS, Inspection, Progress, inspect_files
from modmeta.data.scan import LAYOUT, Scan, Skipped, scan, scan_domain
from modmeta.errors import ModmetaError


@dataclass(frozen=True)
class Survey:
    """What one pass over a folder found.

    Attributes:
        folder: the folder that was asked for.
        base: the folder that all relative paths begin at: ``folder``, or its parent if it is a single domain.
        single: whether ``folder`` is a single domain ``class/image``.
        inspections: of every image file, sorted by domain, class and name.
        skipped: entries that were passed over, and why.
        faults: one line for each folder that cannot be used.
        good: ``(n,)``, the inspections whose verdict is ok.
        descriptors: ``(n, 624)``, float32, of the good ones, see :func:`modmeta.data.audit.descriptor.describe`.
    """

    folder: Path
    base: Path
    single: bool
    inspections: tuple[Inspection, ...]
    skipped: tuple[Skipped, ...]
    faults: tuple[str, ...]
    good: np.ndarray
    descriptors: np.ndarray

    def path(self, row: int) -> Path:
        """Return the file of an inspection."""
        return self.base / self.inspections[row].relative


def take_survey(folder: Path, workers: int = WORKERS, progress: Progress | None = None) -> Survey:
    """Inspect every image below a folder.

    If no image lies at ``folder/domain/class/image`` but some lie at ``folder/class/image``, the folder is taken
    as a single domain.

    Args:
        folder: where to look.
        workers: threads that decode.
        progress: called after each image with the number of images done and of all images.

    Raises:
        ModmetaError: if the folder is missing or holds no image in either place.
    """
    found, base = _find(folder)
    inspections: list[Inspection] = []
    descriptors = [np.empty((0, LENGTH), np.float32)]
    for inspection, pixels in inspect_files(base, found.files, IMAGE_SIZE, workers, progress):
        inspections.append(inspection)
        if pixels is not None:
            descriptors.append(describe(F.resize(pixels, [SIZE, SIZE], antialias=True).numpy()[None]))
    good = np.flatnonzero([inspection.verdict == "ok" for inspection in inspections])
    return Survey(
        folder, base, base != folder, tuple(inspections), found.skipped, found.faults, good, np.concatenate(descriptors)
    )


def _find(folder: Path) -> tuple[Scan, Path]:
    found = scan(folder)
    if found.files:
        return found, folder
    domain = scan_domain(folder)
    if not domain.files:
        raise ModmetaError(f"the data folder {printable(str(folder))} holds no image; {LAYOUT} or DOMAIN/class/image")
    return domain, folder.resolve().parent
