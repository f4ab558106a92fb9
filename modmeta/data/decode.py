"""The one place that opens image files."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modmeta.errors import ModmetaError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MAX_PIXELS = 50_000_000
VERSION = 1  # part of every cache's key; raise it when a change here changes pixels


def decode_image(path: str | os.PathLike[str], image_size: int) -> Tensor:
    """Read an image file as the backbone should see it.

    Orientation tags are obeyed, transparency is laid on white, 16-bit values are divided by 257, and
    of an animation the first frame is taken. The largest centred square is resized to ``image_size``.

    Args:
        path: the file.
        image_size: side of the result in pixels.

    Returns:
        ``(3, image_size, image_size)``, uint8.

    Raises:
        ModmetaError: if the file is no image of a known format, is damaged, or is too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _bad(path, f"has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")
            # JPEG can leave out detail while decoding; keep twice what the resize below needs.
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
            if rgb is None:
                raise _bad(path, f"has pixels of type {image.mode}, whose range is unknown")
    except ModmetaError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise _bad(path, f"cannot be decoded ({_one_line(error)})") from error
    return _square(torch.from_numpy(np.array(rgb)).permute(2, 0, 1), image_size)


def _to_rgb(image: Image.Image) -> Image.Image | None:
    if image.mode == "F":
        return None
    if image.mode.startswith("I"):
        scaled = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255).round()
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _square(image: Tensor, size: int) -> Tensor:
    # Cropping before resizing gives the picture of "resize the shorter side, crop the centre", but a
    # file of 1 x 50,000,000 pixels never grows on the way.
    side = min(image.shape[-2:])
    square = F.center_crop(image, [side, side])
    return F.resize(square, [size, size], InterpolationMode.BICUBIC, antialias=True).contiguous()


def _bad(path: str | os.PathLike[str], what: str) -> ModmetaError:
    return ModmetaError(f"image {os.fspath(path)} {what}; remove or fix it")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
