import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modmeta.data import decode, inspect
from modmeta.data.folders import DomainFolder
from modmeta.errors import ModmetaError

Make = Callable[..., Path]


def test_names_rows_and_images(make_folder: Make) -> None:
    root = make_folder()
    store = DomainFolder(root, 12)
    assert store.domains == ("art", "photo")
    assert store.classes == ("cat", "dog")
    assert len(store) == 12
    row = store.ids("photo", "dog")[1]
    assert store.path(row) == root / "photo" / "dog" / "1.png"
    pixels = np.asarray(Image.open(store.path(row)))
    assert torch.equal(store.load([row])[0], torch.from_numpy(pixels.copy()).permute(2, 0, 1))


@pytest.mark.filterwarnings("ignore:.*lie in two domains")
def test_a_domain_may_lack_a_class(make_folder: Make) -> None:
    make_folder("art", "cat dog")
    store = DomainFolder(make_folder("photo", "cat"), 8)
    assert store.classes_of("photo") == ("cat",)
    assert store.ids("photo", "dog").size == 0


@pytest.mark.parametrize(("domain", "name", "nearest"), [("Art", "cat", "'art'"), ("art", "dgo", "'dog'")])
def test_unknown_names(make_folder: Make, domain: str, name: str, nearest: str) -> None:
    store = DomainFolder(make_folder(), 8)
    with pytest.raises(ModmetaError, match=f"did you mean {nearest}"):
        store.ids(domain, name)


@pytest.mark.fault(9)
def test_skipped_entries_are_counted_in_one_warning(make_folder: Make) -> None:
    root = make_folder()
    (root / "art" / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "photo" / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.warns(UserWarning, match="passed over") as caught:
        store = DomainFolder(root, 8)
    (warning,) = caught
    assert str(warning.message) == (
        f"2 entries below {root} are passed over; the first, art/cat/Thumbs.db, is not named like an image"
    )
    assert warning.filename == __file__
    assert len(store) == 12
    assert store.quarantined == ()


def break_missing(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()


def break_no_domains(root: Path) -> None:
    break_missing(root)
    root.mkdir()


def break_no_classes(root: Path) -> None:
    (root / "empty").mkdir()


def break_no_images(root: Path) -> None:
    (root / "art" / "bird").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, "data does not exist; expected ROOT/domain/class/image"),
        (break_no_domains, "data has no domain folders; expected ROOT/domain/class/image"),
        (break_no_classes, "empty has no class folders; expected"),
        (break_no_images, "bird holds no image"),
    ],
)
def test_a_wrong_layout_is_named(make_folder: Make, damage: Callable[[Path], None], message: str) -> None:
    root = make_folder()
    damage(root)
    with pytest.raises(ModmetaError, match=message) as caught:
        DomainFolder(root, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(1, 3)
@pytest.mark.parametrize("cached", [True, False])
def test_bad_images_are_quarantined_and_the_rest_goes_on(make_folder: Make, tmp_path: Path, cached: bool) -> None:
    root = make_folder()
    good = DomainFolder(root, 8)
    (root / "art" / "cat" / "0a.jpg").write_text("not an image")
    (root / "photo" / "dog" / "3.png").write_bytes(b"")
    for _ in range(2):  # the second time from the kept verdicts
        with pytest.warns(UserWarning, match=r"2 of 14 images .* the first, art/cat/0a\.jpg, is no image of a known"):
            store = DomainFolder(root, 8, tmp_path / "cache" if cached else None)
        assert [one.relative for one in store.quarantined] == ["art/cat/0a.jpg", "photo/dog/3.png"]
        assert [one.reason for one in store.quarantined][1] == "is empty"
        assert len(store) == 12
        assert [store.path(row) for row in range(12)] == [good.path(row) for row in range(12)]
        assert torch.equal(store.load(range(12)), good.load(range(12)))
        assert store.key != good.key


@pytest.mark.fault(1)
def test_strict_refuses_the_first_bad_image(make_folder: Make) -> None:
    root = make_folder()
    assert len(DomainFolder(root, 8, strict=True)) == 12
    (root / "art" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(ModmetaError, match=r"^art/dog/1\.png, is empty; remove or fix it, or drop strict_images$"):
        DomainFolder(root, 8, strict=True)


@pytest.mark.fault(10)
def test_a_class_of_bad_images_is_an_error(make_folder: Make) -> None:
    root = make_folder()
    for path in (root / "art" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ModmetaError, match=r"art/dog holds no good image; the first, art/dog/0\.png, is empty; add"):
        DomainFolder(root, 8)


@pytest.mark.fault(15)
def test_the_same_pixels_under_two_labels_are_not_used(make_folder: Make) -> None:
    root = make_folder()
    before = DomainFolder(root, 8)
    with Image.open(root / "art" / "cat" / "1.png") as image:
        image.save(root / "art" / "dog" / "7.bmp")
    with pytest.warns(UserWarning, match=r"2 of 13 .*art/cat/1\.png, has the same pixels as art/dog/7\.bmp, which"):
        store = DomainFolder(root, 8)
    kept = [row for row in range(12) if before.path(row) != root / "art" / "cat" / "1.png"]
    assert [store.path(row) for row in range(len(store))] == [before.path(row) for row in kept]
    assert torch.equal(store.load(range(len(store))), before.load(kept))
    with pytest.raises(ModmetaError, match=r"art/cat/1\.png, has the same pixels as art/dog/7\.bmp"):
        DomainFolder(root, 8, strict=True)


@pytest.mark.fault(15)
def test_copies_are_used_once(make_folder: Make) -> None:
    root = make_folder()
    before = DomainFolder(root, 8)
    with Image.open(root / "art" / "cat" / "1.png") as image:
        image.save(root / "art" / "cat" / "7.bmp")
    with pytest.warns(UserWarning, match=r"1 of 13 images .*, art/cat/7\.bmp, has the pixels of art/cat/1\.png"):
        store = DomainFolder(root, 8, strict=True)
    assert store.copies == (("art/cat/7.bmp", "art/cat/1.png"),)
    assert store.quarantined == ()
    assert torch.equal(store.load(range(12)), before.load(range(12)))


@pytest.mark.fault(15)
def test_images_of_two_domains_are_told(make_folder: Make) -> None:
    root = make_folder()
    (root / "photo" / "dog" / "7.png").write_bytes((root / "art" / "cat" / "1.png").read_bytes())
    with pytest.warns(UserWarning, match=r"1 of 13 .* two domains.* first are art/cat/1\.png and photo/dog/7\.png"):
        store = DomainFolder(root, 8)
    assert len(store) == 13


def test_decoded_images_are_reused(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder()
    first = DomainFolder(root, 8, tmp_path / "cache").load(range(12))
    monkeypatch.setattr(decode, "decode_image", None)  # nothing may be decoded again
    monkeypatch.setattr(inspect, "decode_bytes", None)
    assert torch.equal(DomainFolder(root, 8, tmp_path / "cache").load(range(12)), first)


def test_the_inspection_decodes_for_good(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DomainFolder(make_folder(), 12)
    monkeypatch.setattr(decode, "decode_image", None)
    pixels = [np.asarray(Image.open(store.path(row))) for row in range(12)]
    assert np.array_equal(store.load(range(12)).permute(0, 2, 3, 1).numpy(), np.stack(pixels))


def test_a_file_that_is_damaged_later_is_named(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modmeta.data.folders.MEMORY_LIMIT", 100)
    with pytest.warns(UserWarning, match="give a cache_dir"):
        store = DomainFolder(make_folder(), 8)
    store.path(3).write_text("no image")
    with pytest.raises(ModmetaError, match=r"0\.png is no image of a known format"):
        store.load([3])


def test_a_changed_file_is_decoded_again(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    store = DomainFolder(root, 8, tmp_path / "cache")
    store.load([0])
    Image.new("L", (8, 8), 9).save(store.path(0))
    changed = DomainFolder(root, 8, tmp_path / "cache")
    assert changed.key != store.key
    assert changed.load([0]).unique().tolist() == [9]


def test_key_knows_the_image_size(make_folder: Make) -> None:
    root = make_folder()
    assert DomainFolder(root, 8).key != DomainFolder(root, 9).key
    assert DomainFolder(root, 8).key == DomainFolder(root, 8).key


def test_too_many_images_for_memory_are_decoded_each_time(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modmeta.data.folders.MEMORY_LIMIT", 100)
    root = make_folder()
    with pytest.warns(UserWarning, match="give a cache_dir"):
        store = DomainFolder(root, 8)
    assert store.load([3, 3]).shape == (2, 3, 8, 8)


def test_pickle_takes_no_images_along(make_folder: Make, tmp_path: Path) -> None:
    store = DomainFolder(make_folder(side=64), 64, tmp_path / "cache")
    images = store.load(range(12))
    packed = pickle.dumps(store)
    assert len(packed) < 5000
    assert torch.equal(pickle.loads(packed).load(range(12)), images)
