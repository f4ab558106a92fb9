import io
import os
import pickle
import socket
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFile

import modmeta
from modmeta.data import decode
from modmeta.data.decode import BadImageError, decode_image, printable, read_image
from modmeta.data.inspect import inspect_file
from modmeta.errors import ModmetaError

within = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NOISE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_nothing_else_in_the_package_opens_images() -> None:
    root = Path(modmeta.__file__).parent
    words = ("Image.open", "torchvision.io", "torchvision.datasets", "imageio", "cv2")
    found = {path.name for path in root.rglob("*.py") if any(word in path.read_text() for word in words)}
    assert found == {"decode.py"}
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.fault(5)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_tagged_image_equals_the_turned_one(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    tagged = saved(Image.fromarray(NOISE), tmp_path / f"tagged.{suffix}", exif=exif, **lossless)
    turned = np.ascontiguousarray(TURNS[orientation](NOISE))
    plain = saved(Image.fromarray(turned), tmp_path / f"plain.{suffix}", **lossless)
    assert torch.equal(decode_image(tagged, 16), decode_image(plain, 16))
    expected = () if orientation == 1 else (f"EXIF orientation {orientation} applied",)
    assert read_image(tagged, 16).notes == expected


@pytest.mark.fault(5)
def test_unreadable_exif_is_ignored_with_a_note(tmp_path: Path) -> None:
    broken = read_image(saved(Image.fromarray(NOISE), tmp_path / "a.png", exif=b"junk"), 16)
    plain = decode_image(saved(Image.fromarray(NOISE), tmp_path / "b.png"), 16)
    assert torch.equal(broken.pixels, plain)
    assert broken.notes == ("unreadable EXIF data ignored",)


@pytest.mark.fault(4)
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@given(values=arrays(np.uint16, (8, 8)))
@within
def test_sixteen_bits_are_divided_not_cut(tmp_path: Path, suffix: str, values: np.ndarray) -> None:
    decoded = read_image(saved(Image.fromarray(values), tmp_path / f"a.{suffix}"), 8)
    assert np.array_equal(decoded.pixels[0].numpy(), (values / 257).round())
    assert decoded.notes == ("16-bit values divided by 257",)


@pytest.mark.fault(4)
def test_sixteen_bit_colours_are_scaled(tmp_path: Path) -> None:
    random = np.random.default_rng(1).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in random)
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8, zlib.compress(rows), depth=16, color=2))
    decoded = read_image(path, 8)
    assert np.abs(decoded.pixels.permute(1, 2, 0).numpy() - random / 257).max() <= 1
    assert decoded.notes == ("16-bit colours cut to 8 bits",)


@pytest.mark.fault(4)
def test_wide_integers_within_sixteen_bits_only(tmp_path: Path) -> None:
    values = np.full((8, 8), 128 * 257, np.int32)
    assert decode_image(saved(Image.fromarray(values), tmp_path / "a.tif"), 8).unique().tolist() == [128]
    for outside in (-1, 65536):
        values[3, 3] = outside
        with pytest.raises(BadImageError, match=r"b\.tif has pixels of type I with values outside 0..65535"):
            decode_image(saved(Image.fromarray(values), tmp_path / "b.tif"), 8)


@pytest.mark.fault(4)
def test_float_pixels_need_a_declared_range(tmp_path: Path) -> None:
    values = np.linspace(-1, 3, 64, dtype=np.float32).reshape(8, 8)
    image = Image.fromarray(values)
    with pytest.raises(BadImageError, match=r"f\.tif has pixels of type F, whose range is unknown"):
        decode_image(saved(image, tmp_path / "f.tif"), 8)
    decoded = read_image(saved(image, tmp_path / "g.tif", tiffinfo={340: -1.0, 341: 3.0}), 8)
    assert np.array_equal(decoded.pixels[1].numpy(), ((values.astype(float) + 1) / 4 * 255).round())
    assert decoded.notes == ("floating-point values -1..3 scaled to 8 bits",)
    for wrong, low in ((np.nan, -1.0), (4.0, -1.0), (0.0, 3.0)):
        changed = values.copy()
        changed[0, 0] = wrong
        path = saved(Image.fromarray(changed), tmp_path / "h.tif", tiffinfo={340: low, 341: 3.0})
        with pytest.raises(BadImageError, match=r"h\.tif has pixels of type F"):
            decode_image(path, 8)


@pytest.mark.fault(6)
@given(rgba=arrays(np.uint8, (8, 8, 4)))
@within
def test_transparency_is_laid_on_white(tmp_path: Path, rgba: np.ndarray) -> None:
    image = decode_image(saved(Image.fromarray(rgba), tmp_path / "a.png"), 8).permute(1, 2, 0).numpy()
    color, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    assert np.abs(image - (color * alpha + 255 * (1 - alpha))).max() <= 1
    assert (image[rgba[..., 3] == 0] == 255).all()


@pytest.mark.fault(6)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_hides_under_transparency_is_never_seen(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 20, 30, 255, 0, 0])
        image.save(path, transparency=0)
    elif mode == "I;16":
        path.write_bytes(png(8, 8, zlib.compress((b"\0" + b"\0\7" * 8) * 8), 16, 0, chunk(b"tRNS", b"\0\7")))
    elif mode in ("L", "RGB"):
        color = 7 if mode == "L" else (7, 8, 9)
        Image.new(mode, (8, 8), color).save(path, transparency=color)
    else:
        Image.new(mode, (8, 8), (90,) * (len(mode) - 1) + (0,)).save(path)
    decoded = read_image(path, 8)
    assert decoded.pixels.unique().tolist() == [255]
    assert "transparency laid on white" in decoded.notes


@pytest.mark.fault(6)
def test_an_opaque_image_gets_no_note(tmp_path: Path) -> None:
    decoded = read_image(saved(Image.new("RGBA", (8, 8), (1, 2, 3, 255)), tmp_path / "a.png"), 8)
    assert decoded.notes == ()
    assert decoded.pixels[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.fault(6)
@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    path = saved(red, tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    expected = np.asarray(red.convert("RGB"))[0, 0]
    decoded = read_image(path, 8)
    assert decoded.pixels.shape == (3, 8, 8)
    assert decoded.pixels.dtype == torch.uint8
    assert decoded.pixels[:, 0, 0].tolist() == expected.tolist()
    assert decoded.notes == (("CMYK converted to RGB",) if mode == "CMYK" else ())
    assert (decoded.width, decoded.height, decoded.mode) == (8, 8, mode)


@pytest.mark.fault(6)
@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black", "red")]
    decoded = read_image(saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:]), 8)
    assert decoded.pixels.unique().tolist() == [255]
    assert decoded.notes == ("first of several frames or pages taken",)


def test_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 10).unique().tolist() == [255]


def test_extreme_aspect_ratio_stays_small(tmp_path: Path) -> None:
    path = saved(Image.new("L", (8, 1_000_000), 7), tmp_path / "a.png")
    assert decode_image(path, 32).unique().tolist() == [7]


def test_large_jpeg_is_reduced_faithfully(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    pixels = np.repeat(np.broadcast_to(ramp, (1024, 1024))[..., None], 3, axis=2)
    jpeg = decode_image(saved(Image.fromarray(pixels), tmp_path / "a.jpg", quality=95), 64).int()
    png = decode_image(saved(Image.fromarray(pixels), tmp_path / "a.png"), 64).int()
    assert (jpeg - png).abs().max() <= 4


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, depth: int = 8, color: int = 0, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.fault(7)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (7_100, "has 7100 x 7100 pixels, more than 50 million"),
        (10_200, "has 10200 x 10200 pixels, more than 50 million"),  # 104 million: Pillow only warns
        (20_480, "has far more than 50 million pixels"),  # 419 million: Pillow refuses by itself
    ],
)
def test_bombs_are_refused_from_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, reason: str
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, zlib.compress(bytes(1000))))

    def explode(self: ImageFile.ImageFile) -> None:
        raise AssertionError("the bomb is decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    with pytest.raises(BadImageError, match=reason):
        decode_image(path, 8)


@pytest.mark.fault(7)
@pytest.mark.filterwarnings("error")
def test_bombs_are_refused_where_warnings_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(10_200, 10_200, b""))
    with pytest.raises(BadImageError, match="has far more than 50 million pixels"):
        decode_image(path, 8)


@pytest.mark.fault(7)
def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(40_000_000_000)  # sparse
    with pytest.raises(BadImageError, match=r"large\.png has 40000\.0 MB, more than 30"):
        decode_image(path, 8)


@pytest.mark.fault(8)
@pytest.mark.parametrize("size", [(1, 1), (4000, 2), (7, 8)])
def test_small_images_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = saved(Image.new("L", size), tmp_path / "small.png")
    with pytest.raises(BadImageError, match=f"has {size[0]} x {size[1]} pixels, smaller than 8 px") as caught:
        decode_image(path, 8)
    assert caught.value.header == (*size, "L")
    again = pickle.loads(pickle.dumps(caught.value))  # as from a data loader's worker
    assert str(again) == str(caught.value)
    assert again.header == caught.value.header


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"this is text", "is no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is no image of a known format"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "fake.jpg"
    path.write_bytes(content)
    with pytest.raises(ModmetaError, match=rf"fake\.jpg {reason}.*; remove or fix it$") as caught:
        decode_image(path, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(1)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp", "ppm"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"cut.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImageError, match=rf"cut\.{suffix} cannot be decoded"):
        decode_image(path, 8)


@pytest.mark.fault(3, 9)
def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)
    server.bind("socket.png")
    kinds = {"fifo.png": "a FIFO", "folder.png": "a folder", "socket.png": "a socket", "/dev/zero": "a device"}
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_without_waiting", lambda path, flags: pytest.fail(f"{path} is opened"))
        for name, kind in kinds.items():
            with pytest.raises(BadImageError, match=f"is {kind}, not a file"):
                decode_image(name, 8)
    server.close()
    # The file is exchanged after the first look: the second one does not wait for a writer either.
    regular = Path(saved(Image.new("L", (8, 8)), tmp_path / "a.png")).stat()
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with pytest.raises(BadImageError, match="is a FIFO, not a file"):
        decode_image("fifo.png", 8)


@pytest.mark.fault(9)
def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("L", (8, 8)), tmp_path / "a.png")

    def deny(path: str, flags: int) -> int:  # as chmod 000 does to everyone but root
        raise PermissionError(13, "Permission denied")

    with pytest.raises(BadImageError, match=r"cannot be read \(File name too long\)"):
        decode_image(tmp_path / ("x" * 300 + ".png"), 8)
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(BadImageError, match="cannot be read"):
        decode_image(tmp_path / "loop.png", 8)
    monkeypatch.setattr(decode, "_without_waiting", deny)
    with pytest.raises(BadImageError, match=r"a\.png cannot be read \(Permission denied\)"):
        decode_image(path, 8)


def encoded(format_name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, format_name)
    return stream.getvalue()


@pytest.mark.fault(1)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=st.data(), format_name=st.sampled_from(decode.FORMATS))
@settings(within, max_examples=150)
def test_damage_gives_pixels_or_one_line(tmp_path: Path, data: st.DataObject, format_name: str) -> None:
    content = bytearray(encoded(format_name))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.img"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with suppress(BadImageError):  # anything else is a failure
        assert decode_image(path, 8).shape == (3, 8, 8)
    reason = inspect_file(tmp_path.parent.parent, "/".join(path.parts[-3:])).reason
    assert len((reason or "").splitlines()) <= 1


@pytest.mark.fault(41)
@given(name=st.text(st.characters()) | st.binary().map(os.fsdecode))
def test_any_name_is_printable(name: str) -> None:
    assert len(printable(name).splitlines()) <= 1
    printable(name).encode()  # does not raise, also where the name has bytes that are no UTF-8
    assert printable("Zoë's 写真.png") == "Zoë's 写真.png"
