from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modmeta.data import decode
from modmeta.data.decode import decode_image
from modmeta.errors import ModmetaError


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png", exif=exif), 16)
    assert image[:, :8].float().mean() < 1
    assert image[:, 8:].float().mean() > 254


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    pixels = np.full((8, 8), 128 * 257, np.uint16)
    assert decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 8).unique().tolist() == [128]
    assert decode_image(saved(Image.fromarray(pixels), tmp_path / "a.tif"), 8).unique().tolist() == [128]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        image = Image.new("P", (8, 8), 0)
        path = tmp_path / "a.png"
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.save(path, transparency=0)
    else:
        Image.new(mode, (8, 8), (0,) * len(mode)).save(path)
    assert decode_image(path, 8).unique().tolist() == [255]


def test_half_transparent_black_is_grey(tmp_path: Path) -> None:
    path = saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), tmp_path / "a.png")
    assert decode_image(path, 8).unique().tolist() == [127]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    path = saved(red, tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    expected = np.asarray(red.convert("RGB"))[0, 0]
    image = decode_image(path, 8)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == expected.tolist()


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode_image(path, 8).unique().tolist() == [255]


def test_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 10).unique().tolist() == [255]


def test_extreme_aspect_ratio_stays_small(tmp_path: Path) -> None:
    path = saved(Image.new("L", (1, 1_000_000), 7), tmp_path / "a.png")
    assert decode_image(path, 32).unique().tolist() == [7]


def test_large_jpeg_is_reduced_faithfully(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    pixels = np.repeat(np.broadcast_to(ramp, (1024, 1024))[..., None], 3, axis=2)
    jpeg = decode_image(saved(Image.fromarray(pixels), tmp_path / "a.jpg", quality=95), 64).int()
    png = decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 64).int()
    assert (jpeg - png).abs().max() <= 4


def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("L", (64, 64)), tmp_path / "big.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(ModmetaError, match=r"big\.png has 64 x 64 pixels"):
        decode_image(path, 8)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("L", (64, 64)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ModmetaError, match=r"bomb\.png cannot be decoded"):
        decode_image(path, 8)


@pytest.mark.parametrize("content", [b"", b"this is text", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fake.jpg"
    path.write_bytes(content)
    with pytest.raises(ModmetaError, match=r"fake\.jpg cannot be decoded.*; remove or fix it$") as caught:
        decode_image(path, 8)
    assert "\n" not in str(caught.value)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ModmetaError, match=r"cut\.png"):
        decode_image(path, 8)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.ones((8, 8), np.float32)), tmp_path / "f.tif")
    with pytest.raises(ModmetaError, match=r"f\.tif has pixels of type F, whose range is unknown"):
        decode_image(path, 8)
