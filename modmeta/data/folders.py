"""Domains on disk: ``root/domain/class/image``."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from modmeta.data import decode
from modmeta.data.cache import RowCache
from modmeta.data.images import Ids, ImageStore
from modmeta.data.inspect import Inspection, inspect_files
from modmeta.data.scan import ImageFile, Scan, scan
from modmeta.data.screen import Screened, screen
from modmeta.data.verdicts import read_verdicts, write_verdicts
from modmeta.errors import ModmetaError

MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded images that are kept when there is no cache folder
CHUNK = 256  # images that are inspected before their pixels go into the cache


class DomainFolder(ImageStore):
    """Images in a folder tree ``root/domain/class/image``, all inspected before any is used.

    - A bad image is quarantined: it is left out, never replaced by another, and listed with its reason.
    - The same pixels under two labels of a domain quarantine every file that has them.
    - Of several copies of an image in a class the first is used.
    - Hidden files and folders are passed over, and so are links that lead out of ``root`` or to what is
      known already.

    Each of these is told in one warning. Decoded images are kept under ``cache_dir``, where the verdicts
    are kept too, or in memory while all of them would fit into 2 GiB.

    Args:
        root: the folder of the domains.
        image_size: side of the square images, in pixels.
        cache_dir: a folder for decoded images and verdicts, shared by all runs and processes that name it.
        strict: whether a single quarantined image is an error.

    Attributes:
        quarantined: the images that are not used, with their reasons.
        copies: images with the pixels of another of their class, and that other one.

    Raises:
        ModmetaError: if ``root`` is missing, its layout is not as expected, or a class has no good image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        cache_dir: str | os.PathLike[str] | None = None,
        strict: bool = False,
    ) -> None:
        self.root = Path(root)
        found = scan(self.root)
        if found.faults:
            raise ModmetaError(found.faults[0])
        files, key = found.files, _key(found.files, image_size)
        path = None if cache_dir is None else Path(cache_dir) / f"images-{key[:16]}"
        cache = RowCache(path, len(files), (3, image_size, image_size), torch.uint8)
        self._cache = None if path is None and cache.nbytes > MEMORY_LIMIT else cache
        inspected = self._inspect(files, image_size, None if cache_dir is None else Path(cache_dir))
        screened = screen(inspected)
        if strict and screened.quarantined:
            raise ModmetaError(f"{_told(screened.quarantined[0])}; remove or fix it, or drop strict_images")
        self.quarantined, self.copies = screened.quarantined, screened.copies
        _refuse_emptied(self.root, files, screened)
        self._warn(found, screened)
        used = [files[place] for place in screened.kept]
        domains = sorted({file.domain for file in used})
        classes = sorted({file.class_name for file in used})
        domain_index = {name: index for index, name in enumerate(domains)}
        class_index = {name: index for index, name in enumerate(classes)}
        super().__init__(
            domains,
            classes,
            np.array([domain_index[file.domain] for file in used]),
            np.array([class_index[file.class_name] for file in used]),
            image_size,
            key if len(used) == len(files) else hashlib.sha256(f"{key} {screened.kept}".encode()).hexdigest(),
            _content([inspected[place] for place in screened.kept], image_size),
        )
        self._names = [file.relative for file in files]
        self._places = torch.tensor(screened.kept)  # of the rows, in the scan and in the cache

    def path(self, row: int) -> Path:
        """Return the file of a row."""
        return self.root / self._names[self._places[row]]

    def load(self, ids: Ids) -> Tensor:
        """Return the images of some rows, ``(n, 3, image_size, image_size)``, uint8.

        Raises:
            ModmetaError: if a file has become undecodable since it was inspected; the message names it.
        """
        places = self._places[torch.as_tensor(ids, dtype=torch.int64)]
        return self._decode(places) if self._cache is None else self._cache.get(places, self._decode)

    def _decode(self, places: Tensor) -> Tensor:
        images = torch.empty(len(places), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for image, place in zip(images, places.tolist(), strict=True):
            image.copy_(decode.decode_image(self.root / self._names[place], self.image_size))
        return images

    def _inspect(self, files: Sequence[ImageFile], image_size: int, folder: Path | None) -> list[Inspection]:
        """Inspect what no kept verdict is known of; the pixels go into the cache."""
        kept = None if folder is None else folder / _verdicts_name(self.root, image_size)
        verdicts = {} if kept is None else read_verdicts(kept, files)
        places = [place for place, file in enumerate(files) if file not in verdicts]
        console = Console(stderr=True)
        with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                      console=console, transient=True, disable=not console.is_terminal) as progress:  # fmt: skip
            bar = progress.add_task("inspecting images", total=len(places))
            for first in range(0, len(places), CHUNK):
                some = places[first : first + CHUNK]
                decoded: dict[int, Tensor] = {}
                found = inspect_files(self.root, [files[place] for place in some], image_size)
                for place, (inspection, pixels) in zip(some, found, strict=True):
                    verdicts[files[place]] = inspection
                    if pixels is not None:
                        decoded[place] = pixels
                    progress.advance(bar)
                if self._cache is not None and decoded:
                    self._cache.put(list(decoded), torch.stack(list(decoded.values())))
        if kept is not None and places:
            write_verdicts(kept, verdicts)
        return [verdicts[file] for file in files]

    def _warn(self, found: Scan, screened: Screened) -> None:
        count = len(found.files)
        if found.skipped:
            first = found.skipped[0]
            _tell(f"{len(found.skipped)} entries below {self.root} are passed over; the first, {first.relative}, "
                  f"{first.reason}")  # fmt: skip
        if screened.quarantined:
            _tell(f"{len(screened.quarantined)} of {count} images below {self.root} are quarantined and not used; "
                  f"the first, {_told(screened.quarantined[0])}")  # fmt: skip
        if screened.copies:
            copy, original = screened.copies[0]
            _tell(f"{len(screened.copies)} of {count} images below {self.root} are copies and not used; the first, "
                  f"{copy}, has the pixels of {original}")  # fmt: skip
        if screened.shared:
            one, other = screened.shared[0]
            _tell(f"{len(screened.shared)} of {count} images below {self.root} lie in two domains, so that one domain "
                  f"tells of the other; the first are {other} and {one}")  # fmt: skip
        if self._cache is None:
            _tell(f"{count} images do not fit into memory and are decoded every time; give a cache_dir to keep them "
                  f"on disk")  # fmt: skip


def _tell(line: str) -> None:
    warnings.warn(line, stacklevel=4)


def _told(inspection: Inspection) -> str:
    return f"{inspection.relative}, {inspection.reason}"


def _refuse_emptied(root: Path, files: Sequence[ImageFile], screened: Screened) -> None:
    left = {(files[place].domain, files[place].class_name) for place in screened.kept}
    for inspection in screened.quarantined:
        cell = (inspection.domain, inspection.class_name)
        if cell not in left:
            raise ModmetaError(
                f"the class folder {root.joinpath(*cell)} holds no good image; the first, {_told(inspection)}; "
                f"add images or remove the folder"
            )


def _verdicts_name(root: Path, image_size: int) -> str:
    place = hashlib.sha256(f"{decode.VERSION} {image_size} {root.resolve()}".encode()).hexdigest()
    return f"verdicts-{place[:16]}.jsonl"


def _key(files: Sequence[ImageFile], image_size: int) -> str:
    digest = hashlib.sha256(f"{decode.VERSION} {image_size}".encode())
    for file in files:
        digest.update(b"\0" + os.fsencode(file.relative))
        digest.update(b"\0%d\0%d" % (file.size, file.changed_ns))
    return digest.hexdigest()


def _content(inspected: Sequence[Inspection], image_size: int) -> str:
    digest = hashlib.sha256(f"{decode.VERSION} {image_size}".encode())
    for each in inspected:
        digest.update(b"\0" + os.fsencode(each.relative) + b"\0" + str(each.bytes_sha256).encode())
    return digest.hexdigest()
