"""Small pictures as data URIs, encoded anew from pixels so that nothing else of a file comes along."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from modmeta.data.decode import decode_image

SIZE = 96  # pixels


def thumbnail(path: Path) -> str:
    """Return the image in a file as the data URI of a JPEG of 96 x 96 pixels.

    Raises:
        ModmetaError: if the file cannot be decoded.
    """
    pixels = decode_image(path, SIZE).permute(1, 2, 0).numpy()
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
