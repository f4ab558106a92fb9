"""A folder with every kind of bad file, for the tests of ``check``."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = "<script>alert(1)<&script>"


def picture(seed: int, size: int = 48) -> Image.Image:
    """Return a picture of coarse colour blocks, unlike that of any other seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)


def clean(root: Path, per_class: int = 3) -> Path:
    """Make two domains of two classes, without anything to complain of."""
    for place, name in enumerate(("photo/cat", "photo/dog", "sketch/cat", "sketch/dog")):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            picture(100 * place + number).save(root / name / f"{number}.png")
    return root


def zoo(root: Path, elsewhere: Path) -> Path:
    """Make a folder with everything that can be wrong; ``elsewhere`` is a folder outside of it."""
    clean(root)
    cat = root / "photo" / "cat"
    picture(1, 200).save(cat / "whole.jpg", quality=95)
    content = (cat / "whole.jpg").read_bytes()
    (cat / "truncated.jpg").write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    (cat / "garbage.jpg").write_bytes(content[:middle] + bytes(range(100, 140)) + content[middle + 40 :])
    (cat / "zero.jpg").touch()
    (cat / "text.jpg").write_text("no image")
    (cat / "folder.jpg").mkdir()
    Image.fromarray(np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)).save(cat / "deep.png")
    Image.fromarray(np.random.default_rng(0).random((48, 48), np.float32)).save(cat / "float.tiff")
    rotated = picture(2).crop((0, 0, 48, 30))
    exif = rotated.getexif()
    exif[0x0112], exif[0x010E] = 6, "a secret of mine"
    rotated.save(cat / "rotated.jpg", exif=exif)
    picture(3).convert("CMYK").save(cat / "cmyk.jpg")
    picture(4).quantize(16).save(cat / "palette.png", transparency=3)
    picture(5).save(cat / "animated.gif", save_all=True, append_images=[picture(6)])
    _bomb(cat / "bomb.png")
    Image.new("RGB", (1, 1)).save(cat / "dot.png")
    Image.new("RGB", (4000, 2)).save(cat / "line.png")
    (root / "photo" / "dog" / "loop").symlink_to(root / "photo")
    picture(7).save(elsewhere / "outside.png")
    (cat / "outside.png").symlink_to(elsewhere / "outside.png")
    (cat / "dangling.png").symlink_to(cat / "nowhere.png")
    os.mkfifo(cat / "pipe.png")
    shutil.copy(cat / "0.png", os.fsencode(cat) + b"/\xff.png")
    shutil.copy(cat / "0.png", cat / "line\nbreak.png")
    (root / "photo" / "empty").mkdir()
    (root / "photo" / ".hidden").mkdir()
    (root / "photo" / SCRIPT).mkdir()
    picture(8).save(root / "photo" / SCRIPT / "0.png")
    shutil.copy(cat / "1.png", cat / "again.png")
    picture(9).save(cat / "both.png")
    picture(9).save(root / "photo" / "dog" / "both.bmp")
    picture(10, 200).save(cat / "near.png")
    picture(10, 200).resize((150, 150)).save(root / "photo" / "dog" / "near.jpg")
    return root


def _bomb(path: Path) -> None:
    """Write a PNG of 10,200 x 10,200 pixels, all black, in some ten thousand bytes."""
    side = 10_200
    content = zlib.compress(bytes(1 + side // 8) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in chunks:
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
