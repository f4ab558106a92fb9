"""Images in a folder of any shape, for the commands that take one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modmeta.data.decode import SUFFIXES, BadImageError, decode_image
from modmeta.errors import ModmetaError


def find_images(folder: str | Path) -> list[Path]:
    """Return the images below ``folder``, sorted by path; hidden files and folders are passed over.

    Raises:
        ModmetaError: if the folder is missing or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ModmetaError(f"the folder {root} does not exist")
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not found:
        raise ModmetaError(f"the folder {root} holds no image (looked for {', '.join(SUFFIXES)})")
    return sorted(found)


def load_images(paths: Sequence[Path], image_size: int) -> Tensor:
    """Return images ``(B, 3, image_size, image_size)``, uint8.

    Raises:
        ModmetaError: naming the first file that cannot be decoded.
    """
    return torch.stack([decode_image(path, image_size) for path in paths])


def load_good_images(paths: Sequence[Path], image_size: int) -> tuple[dict[Path, Tensor], list[BadImageError]]:
    """Return the images ``(3, image_size, image_size)``, uint8, that can be decoded, and why the others cannot."""
    good: dict[Path, Tensor] = {}
    bad = []
    for path in paths:
        try:
            good[path] = decode_image(path, image_size)
        except BadImageError as error:
            bad.append(error)
    return good, bad
