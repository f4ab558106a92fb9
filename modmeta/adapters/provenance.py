"""Which images an adapter came from: a file says nothing of it, or enough to ask for one image, or their names, too."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modmeta.errors import ModmetaError

LEVELS = ("none", "hashes", "full")
"""What may be written of the images besides their number: nothing; salted hashes; hashes and names."""

_BYTES = 16  # of a hash; nobody gains from a collision, and a file of 10,000 images stays small
_MOST = 20_000  # hashes that fit into the header of an adapter file


def describe_images(images: Tensor, level: str = "hashes", names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what may be written of some images, as plain data.

    Who has an image can find out by its hash whether it is among them. The salt makes the same image hash to another
    value in every file, so that no table of hashes serves for several files, and files do not show what images they
    share. It is derived from all the images together, so that the same images in any order give the same bytes. Hashes
    are sorted: their order says nothing.

    Args:
        images: ``(S, 3, H, W)``, as the backbone is given them.
        level: one of :data:`LEVELS`.
        names: names of the image files, for the level ``full``.

    Raises:
        ModmetaError: for an unknown level, or more images than a file has room for.
    """
    if level not in LEVELS:
        raise ModmetaError(f"provenance must be one of {', '.join(LEVELS)}, got {level!r}")
    if level == "none":
        return {}
    if len(images) > _MOST:
        raise ModmetaError(f"{len(images)} hashes do not fit into an adapter file; adapt with --provenance none")
    pixels = [_pixels(image) for image in images]
    salt = hashlib.sha256(b"".join(sorted(hashlib.sha256(each).digest() for each in pixels))).digest()
    found: dict[str, Any] = {"salt": salt.hex(), "hashes": sorted(_hash(salt, each) for each in pixels)}
    return found | ({"names": sorted(names)} if level == "full" else {})


def holds_image(provenance: Mapping[str, Any], image: Tensor) -> bool:
    """Return whether an image is among those that an adapter file's provenance describes.

    Args:
        provenance: that of the file.
        image: ``(3, H, W)``, decoded to the backbone's size as for the adaptation.

    Raises:
        ModmetaError: if the file holds no hashes.
    """
    salt, hashes = provenance.get("salt"), provenance.get("hashes")
    if not isinstance(salt, str) or not isinstance(hashes, list):
        raise ModmetaError("the adapter file holds no hashes of its images: it was written with --provenance none")
    try:
        return _hash(bytes.fromhex(salt), _pixels(image)) in hashes
    except ValueError as error:
        raise ModmetaError("the adapter file's salt is not hexadecimal; write it again with adapt") from error


def _pixels(image: Tensor) -> bytes:
    return image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _hash(salt: bytes, pixels: bytes) -> str:
    return hmac.new(salt, pixels, hashlib.sha256).digest()[:_BYTES].hex()
