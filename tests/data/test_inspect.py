import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modmeta.data.decode import decode_image
from modmeta.data.inspect import inspect_file, inspect_folder, inspect_pixels

Make = Callable[..., Path]


def test_a_good_image(make_folder: Make) -> None:
    root = make_folder(side=20)
    found, pixels = inspect_pixels(root, "art/cat/0.png", 16)
    content = (root / "art/cat/0.png").read_bytes()
    assert (found.relative, found.domain, found.class_name) == ("art/cat/0.png", "art", "cat")
    assert (found.verdict, found.reason, found.notes, found.mode) == ("ok", None, (), "RGB")
    assert (found.size, found.width, found.height) == (len(content), 20, 20)
    assert found.bytes_sha256 == hashlib.sha256(content).hexdigest()
    expected = decode_image(root / "art/cat/0.png", 16)
    assert pixels is not None
    assert torch.equal(pixels, expected)
    assert found.pixels_sha256 == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    assert inspect_file(root, "art/cat/0.png", 16) == found


def test_equal_pixels_in_unequal_files(make_folder: Make) -> None:
    root = make_folder("art", "cat", images=2)
    with Image.open(root / "art/cat/0.png") as image:
        image.save(root / "art/cat/same.bmp")
    one, other, third = (inspect_file(root, f"art/cat/{name}") for name in ("0.png", "same.bmp", "1.png"))
    assert one.bytes_sha256 != other.bytes_sha256
    assert one.pixels_sha256 == other.pixels_sha256 != third.pixels_sha256
    assert one.dhash == other.dhash != third.dhash


def test_the_hash_says_where_it_gets_brighter(tmp_path: Path) -> None:
    folder = tmp_path / "d" / "c"
    folder.mkdir(parents=True)
    ramp = np.broadcast_to(np.linspace(0, 250, 72).astype(np.uint8), (72, 72))
    Image.fromarray(ramp.copy()).save(folder / "up.png")
    Image.fromarray(ramp[:, ::-1].copy()).save(folder / "down.png")
    half = np.concatenate([ramp[:36], ramp[:36, ::-1]])
    Image.fromarray(half.copy()).save(folder / "half.png")
    hashes = {name: inspect_file(tmp_path, f"d/c/{name}.png").dhash for name in ("up", "down", "half")}
    assert hashes == {"up": 2**64 - 1, "down": 0, "half": 0xFFFFFFFF00000000}
    noise = np.random.default_rng(0).normal(0, 6, ramp.shape)
    Image.fromarray((half + noise).clip(0, 255).astype(np.uint8)).save(folder / "near.jpg", quality=70)
    near = inspect_file(tmp_path, "d/c/near.jpg").dhash
    assert near is not None
    assert (near ^ 0xFFFFFFFF00000000).bit_count() <= 4


@pytest.mark.fault(1, 3, 7, 8, 9)
def test_bad_files_get_verdicts_not_exceptions(make_folder: Make) -> None:
    root = make_folder("art", "cat", images=1, side=64)
    cat = root / "art" / "cat"
    content = (cat / "0.png").read_bytes()
    (cat / "cut.png").write_bytes(content[:2000])
    (cat / "empty.png").write_bytes(b"")
    (cat / "text.jpg").write_text("hello")
    Image.new("L", (4000, 2)).save(cat / "thin.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(cat / "float.tif")
    os.mkfifo(cat / "fifo.png")
    expected = {
        "0.png": None,
        "cut.png": "cannot be decoded",
        "empty.png": "is empty",
        "text.jpg": "is no image of a known format",
        "thin.png": "has 4000 x 2 pixels, smaller than 8 px",
        "float.tif": "has pixels of type F, whose range is unknown",
        "fifo.png": "is a FIFO, not a file",
        "missing.png": "cannot be read",
    }
    for name, reason in expected.items():
        found = inspect_file(root, f"art/cat/{name}")
        assert found.verdict == ("ok" if reason is None else "quarantined")
        assert (found.reason or "").startswith(reason or "")
        assert (found.pixels_sha256 is None) == (found.dhash is None) == (reason is not None)
    cut = inspect_file(root, "art/cat/cut.png")
    assert (cut.size, cut.width, cut.height, cut.mode) == (2000, 64, 64, "RGB")
    assert cut.bytes_sha256 == hashlib.sha256(content[:2000]).hexdigest()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder_is_inspected_in_order(make_folder: Make, workers: int) -> None:
    root = make_folder()
    (root / "art" / "dog" / "1.png").write_text("no image")
    told: list[tuple[int, int]] = []
    found = inspect_folder(root, workers=workers, progress=lambda done, total: told.append((done, total)))
    assert [one.relative for one in found] == sorted(one.relative for one in found)
    assert told == [(done, 12) for done in range(1, 13)]
    assert [one.relative for one in found if one.verdict != "ok"] == ["art/dog/1.png"]
    assert found == [inspect_file(root, one.relative) for one in found]


@pytest.mark.fault(2)
def test_a_changed_file_has_other_bytes(make_folder: Make) -> None:
    root = make_folder("art", "cat", images=1, side=64)
    path = root / "art" / "cat" / "0.jpg"
    with Image.open(root / "art" / "cat" / "0.png") as image:
        image.save(path, quality=90)
    before = inspect_file(root, "art/cat/0.jpg")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(range(40))
    path.write_bytes(content)
    after = inspect_file(root, "art/cat/0.jpg")
    assert after.size == before.size
    assert after.bytes_sha256 != before.bytes_sha256
