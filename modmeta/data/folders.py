"""Domains on disk: ``root/domain/class/image``."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modmeta.data import decode
from modmeta.data.cache import RowCache
from modmeta.data.images import Ids, ImageStore
from modmeta.errors import ModmetaError

MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded images that are kept when there is no cache folder
LAYOUT = "expected ROOT/domain/class/image"


class DomainFolder(ImageStore):
    """Images in a folder tree ``root/domain/class/image``, decoded when first asked for.

    Hidden files and folders are passed over, and so are links to folders or to files outside
    ``root``. Decoded images are kept under ``cache_dir``, or in memory while all of them would fit
    into 2 GiB.

    Args:
        root: the folder of the domains.
        image_size: side of the square images, in pixels.
        cache_dir: a folder for decoded images, shared by all runs and processes that name it.

    Raises:
        ModmetaError: if ``root`` is missing or its layout is not as expected.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        found = scan(Path(root))
        domains = sorted({file.domain for file in found})
        classes = sorted({file.class_name for file in found})
        domain_index = {name: index for index, name in enumerate(domains)}
        class_index = {name: index for index, name in enumerate(classes)}
        super().__init__(
            domains,
            classes,
            np.array([domain_index[file.domain] for file in found]),
            np.array([class_index[file.class_name] for file in found]),
            image_size,
            _key(found, image_size),
        )
        self.root = Path(root)
        self._names = [file.relative for file in found]
        path = None if cache_dir is None else Path(cache_dir) / f"images-{self.key[:16]}"
        cache = RowCache(path, len(self), (3, image_size, image_size), torch.uint8)
        self._cache = None if path is None and cache.nbytes > MEMORY_LIMIT else cache
        if self._cache is None:
            warnings.warn(
                f"{len(self)} images at {image_size} pixels do not fit into memory and are decoded "
                f"every time; give a cache_dir to keep them on disk",
                stacklevel=2,
            )

    def path(self, row: int) -> Path:
        """Return the file of a row."""
        return self.root / self._names[row]

    def load(self, ids: Ids) -> Tensor:
        """Return the images of some rows, ``(n, 3, image_size, image_size)``, uint8.

        Raises:
            ModmetaError: if a file cannot be decoded; the message names it.
        """
        rows = torch.as_tensor(ids)
        return self._decode(rows) if self._cache is None else self._cache.get(rows, self._decode)

    def _decode(self, rows: Tensor) -> Tensor:
        images = torch.empty(len(rows), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            image.copy_(decode.decode_image(self.path(row), self.image_size))
        return images


@dataclass(frozen=True)
class ImageFile:
    """An image that the scanner found, not opened yet."""

    domain: str
    class_name: str
    name: str
    size: int
    changed_ns: int

    @property
    def relative(self) -> str:
        """The path below the root."""
        return os.path.join(self.domain, self.class_name, self.name)


def scan(root: Path) -> list[ImageFile]:
    """List the images below ``root``, sorted by domain, class and name.

    Raises:
        ModmetaError: if ``root`` is missing, or a domain has no classes or a class no images.
    """
    if not root.is_dir():
        raise ModmetaError(f"the data folder {root} does not exist; {LAYOUT}")
    inside = root.resolve()
    found: list[ImageFile] = []
    skipped: list[str] = []
    domains = _folders(root, skipped)
    if not domains:
        raise ModmetaError(f"the data folder {root} has no domain folders; {LAYOUT}")
    for domain in domains:
        classes = _folders(root / domain, skipped)
        if not classes:
            raise ModmetaError(f"the domain folder {root / domain} has no class folders; {LAYOUT}")
        for class_name in classes:
            folder = root / domain / class_name
            images = _images(folder, inside, skipped)
            if not images:
                raise ModmetaError(f"the class folder {folder} holds no image; add images or remove it")
            found += [
                ImageFile(domain, class_name, name, status.st_size, status.st_mtime_ns) for name, status in images
            ]
    if skipped:
        warnings.warn(
            f"{len(skipped)} entries below {root} are neither images nor folders of them, or links that "
            f"lead elsewhere, and were passed over; the first is {skipped[0]}",
            stacklevel=3,
        )
    return found


def _folders(folder: Path, skipped: list[str]) -> list[str]:
    names = []
    for entry in _visible(folder):
        if entry.is_dir(follow_symlinks=False):
            names.append(entry.name)
        elif entry.is_symlink():
            skipped.append(entry.path)
    return names


def _images(folder: Path, inside: Path, skipped: list[str]) -> list[tuple[str, os.stat_result]]:
    images = []
    for entry in _visible(folder):
        is_image = os.path.splitext(entry.name)[1].lower() in decode.SUFFIXES and entry.is_file()
        if is_image and (not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(inside)):
            images.append((entry.name, entry.stat()))
        else:
            skipped.append(entry.path)
    return images


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise ModmetaError(f"cannot read the folder {folder} ({error.strerror}); check its rights") from error


def _key(found: list[ImageFile], image_size: int) -> str:
    digest = hashlib.sha256(f"{decode.VERSION} {image_size}".encode())
    for file in found:
        digest.update(b"\0" + os.fsencode(file.relative))
        digest.update(b"\0%d\0%d" % (file.size, file.changed_ns))
    return digest.hexdigest()
