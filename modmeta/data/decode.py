"""The one place that opens image files, and the rules by which any of them becomes 8-bit RGB.

What does not follow the rules is refused with a reason; what is changed on the way leaves a note.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modmeta.errors import ModmetaError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MAX_BYTES = 30_000_000
MAX_PIXELS = 50_000_000
MIN_SIDE = 8
VERSION = 1  # part of every cache's key; raise it when a change here changes pixels

_ORIENTATION, _LOWEST, _HIGHEST = 0x0112, 340, 341  # TIFF 6.0: Orientation, SMinSampleValue, SMaxSampleValue
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ModmetaError):
    """A file that the rules refuse.

    Attributes:
        path: the file.
        reason: what is wrong, to be read after the file's name.
        header: width, height and mode, if the header could be read.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, header: tuple[int, int, str] | None = None) -> None:
        super().__init__(f"image {printable(os.fspath(path))} {reason}; remove or fix it")
        self.path = path
        self.reason = reason
        self.header = header

    def __reduce__(self) -> tuple[Any, ...]:
        """Let worker processes hand the error over."""
        return type(self), (self.path, self.reason, self.header)


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image as the backbone should see it, and where it came from.

    Attributes:
        pixels: ``(3, image_size, image_size)``, uint8.
        width: of the file's image in pixels, before any rotation.
        height: of the file's image in pixels, before any rotation.
        mode: the file's pixel type, as Pillow calls it.
        notes: the rules that changed the image, such as ``"EXIF orientation 6 applied"``.
    """

    pixels: Tensor
    width: int
    height: int
    mode: str
    notes: tuple[str, ...]


def decode_image(path: str | os.PathLike[str], image_size: int) -> Tensor:
    """Return the pixels of :func:`read_image`, ``(3, image_size, image_size)``, uint8."""
    return read_image(path, image_size).pixels


def read_image(path: str | os.PathLike[str], image_size: int) -> Decoded:
    """Read an image file as the backbone should see it.

    - Orientation tags are obeyed.
    - Integers of more than 8 bits are divided by 257. Floating-point images need a range, which TIFF
      files declare by the tags SMinSampleValue and SMaxSampleValue.
    - Transparency is laid on white, whatever colour hides under it.
    - CMYK and other colour spaces are converted without a colour profile.
    - Of several frames or pages the first is taken.
    - The largest centred square is resized to ``image_size``.

    Nothing but a regular file is ever opened, and limits hold before anything is decoded: 30 MB,
    50 million pixels, 8 pixels for the shorter side.

    Args:
        path: the file.
        image_size: side of the result in pixels.

    Raises:
        BadImageError: if the file is no image of a known format, is damaged, or breaks a limit.
    """
    return decode_bytes(path, read_bytes(path), image_size)


def decode_bytes(path: str | os.PathLike[str], content: bytes, image_size: int) -> Decoded:
    """Decode what :func:`read_bytes` has read, by the rules of :func:`read_image`; ``path`` is for messages."""
    header: tuple[int, int, str] | None = None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            header = (*image.size, image.mode)
            if reason := _breaks_limit(*image.size):
                raise BadImageError(path, reason, header)
            notes: list[str] = []
            rgb = _to_rgb(_upright(image, image_size, notes), notes)
    except BadImageError:
        raise
    except _UnknownRange as error:
        raise BadImageError(path, f"has pixels of type {error}", header) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"has far more than {MAX_PIXELS // 10**6} million pixels"
        raise BadImageError(path, reason, header) from error
    except UnidentifiedImageError as error:
        reason = f"is no image of a known format ({', '.join(FORMATS)})"
        raise BadImageError(path, reason, header) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise BadImageError(path, f"cannot be decoded ({_one_line(error)})", header) from error
    pixels = _square(torch.from_numpy(np.array(rgb)).permute(2, 0, 1), image_size)
    return Decoded(pixels, *header, tuple(notes))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file whole, if it is a regular one of up to 30 MB.

    Raises:
        BadImageError: if it is not, is empty or cannot be read.
    """
    try:
        # Opening a FIFO waits for a writer, and opening a device may act on it: look first. What is put in
        # the file's place between the look and the opening is caught by the second look, without waiting.
        _refuse_irregular(path, os.stat(path))
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            _refuse_irregular(path, status)
            return file.read(MAX_BYTES)
    except OSError as error:
        raise BadImageError(path, f"cannot be read ({error.strerror})") from error


def printable(name: str) -> str:
    """Return a file name with control characters and undecodable bytes escaped, fit for one line of UTF-8."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_irregular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError(path, f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no regular file')}, not a file")
    if status.st_size == 0:
        raise BadImageError(path, "is empty")
    if status.st_size > MAX_BYTES:
        raise BadImageError(path, f"has {status.st_size / 1e6:.1f} MB, more than {MAX_BYTES // 10**6}")


def _breaks_limit(width: int, height: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million"
    if min(width, height) < MIN_SIDE:
        return f"has {width} x {height} pixels, smaller than {MIN_SIDE} px"
    return None


def _upright(image: Image.Image, image_size: int, notes: list[str]) -> Image.Image:
    if getattr(image, "is_animated", False):
        notes.append("first of several frames or pages taken")
    if image.mode[0] != "I" and any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        notes.append("16-bit colours cut to 8 bits")  # by Pillow, as it loads
    # JPEG can leave out detail while decoding; keep twice what the resize below needs.
    image.draft(None, (2 * image_size, 2 * image_size))
    turned = getattr(image, "tag_v2", {}).get(_ORIENTATION, 1)  # Pillow turns TIFF images as it loads them
    image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels are good, and nothing can be known of their orientation
        notes.append("unreadable EXIF data ignored")
        orientation = 1
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if orientation in _TURNS or turned in _TURNS:
        notes.append(f"EXIF orientation {max(orientation, turned)} applied")
    return image


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_numbers(image, notes)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency laid on white")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB"):
        notes.append(f"{image.mode} converted to RGB")
    return image.convert("RGB")


class _UnknownRange(Exception):
    """Says why numbers cannot become 8-bit values."""


def _from_numbers(image: Image.Image, notes: list[str]) -> Image.Image:
    values = np.array(image, np.float64)
    if image.mode == "F":
        low, high = _declared_range(image)
        notes.append(f"floating-point values {low:g}..{high:g} scaled to 8 bits")
    else:
        low, high = 0.0, 65535.0
        notes.append("16-bit values divided by 257")
        if isinstance(clear := image.info.get("transparency"), int):
            values[values == clear] = high
            notes.append("transparency laid on white")
    if not (values.min() >= low and values.max() <= high):  # also where there is a NaN
        raise _UnknownRange(f"{image.mode} with values outside {low:g}..{high:g}")
    scaled = ((values - low) * (255 / (high - low))).round()
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _declared_range(image: Image.Image) -> tuple[float, float]:
    tags = getattr(image, "tag_v2", {})
    try:
        low, high = (float(np.ravel(tags[tag])[0]) for tag in (_LOWEST, _HIGHEST))
    except KeyError:
        raise _UnknownRange("F, whose range is unknown") from None
    if not -np.inf < low < high < np.inf:
        raise _UnknownRange(f"F, whose range {low}..{high} is no range")
    return low, high


def _square(image: Tensor, size: int) -> Tensor:
    # Cropping before resizing gives the picture of "resize the shorter side, crop the centre", but a
    # file of 8 x 5,000,000 pixels never grows on the way.
    side = min(image.shape[-2:])
    square = F.center_crop(image, [side, side])
    return F.resize(square, [size, size], InterpolationMode.BICUBIC, antialias=True).contiguous()


def _one_line(error: Exception) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))
