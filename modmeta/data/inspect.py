"""What is known of an image file once it has been decoded: its verdict, hashes and notes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from modmeta.data.decode import BadImageError, decode_bytes, read_bytes
from modmeta.data.scan import ImageFile, scan

WORKERS = min(4, os.cpu_count() or 1)
AHEAD = 256  # images that may be decoded before somebody takes them
IMAGE_SIZE = 224  # pixels at which images are compared when nobody says at which they will be used
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Inspection:
    """The verdict on one image file.

    Attributes:
        relative: the path below the root, with forward slashes.
        domain: the name of its domain folder.
        class_name: the name of its class folder.
        size: bytes.
        verdict: ``"ok"`` or ``"quarantined"``.
        reason: why it is quarantined, to be read after its name.
        notes: the decoding rules that changed it.
        width: in pixels, as the header says; None if it has no readable header.
        height: in pixels, as the header says.
        mode: the pixel type, as Pillow calls it.
        bytes_sha256: of the file, in hexadecimal; None if it cannot be read.
        pixels_sha256: of the decoded pixels as a backbone sees them at the size of the inspection; None
            if it cannot be decoded.
        dhash: 64 bits, one for each of 8 x 8 places of the grey image that is darker than its right neighbour;
            a small change of the image flips few of them. None if it cannot be decoded.
    """

    relative: str
    domain: str
    class_name: str
    size: int
    verdict: Literal["ok", "quarantined"]
    reason: str | None
    notes: tuple[str, ...]
    width: int | None
    height: int | None
    mode: str | None
    bytes_sha256: str | None
    pixels_sha256: str | None
    dhash: int | None


def inspect_file(root: str | os.PathLike[str], file: str | ImageFile, image_size: int = IMAGE_SIZE) -> Inspection:
    """Decode a file and say what it is; a bad one gets a verdict, never an exception.

    Args:
        root: the folder of the domains.
        file: ``domain/class/name`` below the root, or what the scanner found.
        image_size: side in pixels at which pixels are hashed.
    """
    return inspect_pixels(Path(root), file, image_size)[0]


def inspect_folder(
    root: str | os.PathLike[str],
    *,
    workers: int = WORKERS,
    progress: Progress | None = None,
    image_size: int = IMAGE_SIZE,
) -> list[Inspection]:
    """Inspect every image that the scanner finds, in the scanner's order.

    Args:
        root: the folder of the domains.
        workers: threads that decode.
        progress: called after each image with the number of images done and of all images.
        image_size: side in pixels at which pixels are hashed.

    Raises:
        ModmetaError: if ``root`` is missing.
    """
    files = scan(Path(root)).files
    found = inspect_files(Path(root), files, image_size, workers, progress)
    return [inspection for inspection, _ in found]


def inspect_files(
    root: Path, files: Sequence[ImageFile], image_size: int, workers: int = WORKERS, progress: Progress | None = None
) -> Iterator[tuple[Inspection, Tensor | None]]:
    """Yield the inspection of each file and the pixels of each good one, in their order."""
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside the interpreter lock
        for first in range(0, len(files), AHEAD):
            some = files[first : first + AHEAD]
            results = pool.map(lambda file: inspect_pixels(root, file, image_size), some)
            for done, result in enumerate(results, start=first + 1):
                if progress is not None:
                    progress(done, len(files))
                yield result


def inspect_pixels(root: Path, file: str | ImageFile, image_size: int) -> tuple[Inspection, Tensor | None]:
    """Return the inspection of a file, and its pixels ``(3, image_size, image_size)``, uint8, if it is good."""
    relative = file.relative if isinstance(file, ImageFile) else file
    domain, class_name, _ = relative.split("/")
    path, content = root / relative, b""
    try:
        content = read_bytes(path)
        decoded = decode_bytes(path, content, image_size)
    except BadImageError as error:
        width, height, mode = error.header or (None, None, None)
        sha = hashlib.sha256(content).hexdigest() if content else None
        return Inspection(
            relative, domain, class_name, len(content) or _size(path), "quarantined", error.reason, (),
            width, height, mode, sha, None, None,
        ), None  # fmt: skip
    return Inspection(
        relative, domain, class_name, len(content), "ok", None, decoded.notes,
        decoded.width, decoded.height, decoded.mode,
        hashlib.sha256(content).hexdigest(),
        hashlib.sha256(decoded.pixels.numpy().tobytes()).hexdigest(),
        _difference_hash(decoded.pixels),
    ), decoded.pixels  # fmt: skip


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _difference_hash(pixels: Tensor) -> int:
    grey = F.resize(F.rgb_to_grayscale(pixels), [8, 9], antialias=True)[0]
    return int.from_bytes(np.packbits((grey[:, :-1] < grey[:, 1:]).numpy()).tobytes(), "big")
