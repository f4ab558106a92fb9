import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modmeta.data import decode
from modmeta.data.folders import DomainFolder, scan
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


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_hidden_entries_and_links_are_passed_over(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    before = scan(root)
    (root / ".cache" / "x").mkdir(parents=True)
    (root / "art" / ".ipynb_checkpoints").mkdir()
    (root / "art" / "cat" / ".hidden.png").write_bytes(b"x")
    (root / "art" / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path)
    outside = tmp_path / "outside.png"
    Image.new("L", (8, 8)).save(outside)
    (root / "art" / "cat" / "out.png").symlink_to(outside)
    (root / "art" / "cat" / "dangling.png").symlink_to(tmp_path / "nothing.png")
    assert scan(root) == before


def test_a_link_inside_the_root_is_followed(make_folder: Make) -> None:
    root = make_folder()
    (root / "art" / "cat" / "9.png").symlink_to(root / "photo" / "cat" / "0.png")
    assert len(scan(root)) == 13


def test_other_files_are_counted_in_one_warning(make_folder: Make) -> None:
    root = make_folder()
    (root / "art" / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "photo" / "cat" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"2 entries .*Thumbs\.db") as caught:
        scan(root)
    assert len(caught) == 1


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


def test_text_named_jpg_is_named_when_loaded(make_folder: Make) -> None:
    root = make_folder()
    (root / "art" / "cat" / "0.jpg").write_text("not an image")
    store = DomainFolder(root, 8)
    with pytest.raises(ModmetaError, match=r"0\.jpg cannot be decoded"):
        store.load(store.ids("art", "cat"))


def test_decoded_images_are_reused(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder()
    first = DomainFolder(root, 8, tmp_path / "cache").load(range(12))
    monkeypatch.setattr(decode, "decode_image", None)  # nothing may be decoded again
    assert torch.equal(DomainFolder(root, 8, tmp_path / "cache").load(range(12)), first)


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
