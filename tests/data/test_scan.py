import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from modmeta.data.scan import _name_fault, scan
from modmeta.errors import ModmetaError

Make = Callable[..., Path]


def reasons(root: Path) -> dict[str, str]:
    found = scan(root)
    assert len({entry.relative for entry in found.skipped}) == len(found.skipped)
    return {entry.relative: entry.reason for entry in found.skipped}


def test_images_are_sorted_by_domain_class_and_name(make_folder: Make) -> None:
    root = make_folder("photo art", "dog cat", images=2)
    names = [f"{d}/{c}/{i}.png" for d in ("art", "photo") for c in ("cat", "dog") for i in range(2)]
    found = scan(root)
    assert [file.relative for file in found.files] == names
    assert found.skipped == found.faults == ()
    assert found.files[0].size == (root / names[0]).stat().st_size


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match="nowhere does not exist; expected ROOT/domain/class/image"):
        scan(tmp_path / "nowhere")


@pytest.mark.fault(9)
def test_hidden_entries_are_passed_over_without_a_word(make_folder: Make) -> None:
    root = make_folder()
    before = scan(root)
    (root / ".cache" / "x").mkdir(parents=True)
    (root / "art" / ".ipynb_checkpoints").mkdir()
    (root / "art" / "cat" / ".hidden.png").write_bytes(b"x")
    assert scan(root) == before


@pytest.mark.fault(3, 9)
def test_odd_entries_are_skipped_once_with_a_reason(make_folder: Make) -> None:
    root = make_folder()
    before = scan(root)
    cat = root / "art" / "cat"
    (cat / "Thumbs.db").write_bytes(b"x")
    (cat / "folder.jpg").mkdir()
    Image.new("L", (8, 8)).save(cat / "folder.jpg" / "deep.png")
    os.mkfifo(cat / "fifo.jpg")
    (cat / "line\nbreak.jpg").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(cat) + b"/caf\xe9.jpg")).write_bytes(b"x")
    (root / "art" / "loose.png").write_bytes(b"x")
    (root / "readme.txt").write_text("x")
    assert scan(root).files == before.files
    assert reasons(root) == {
        "art/cat/Thumbs.db": "is not named like an image",
        "art/cat/folder.jpg": "is a folder",
        "art/cat/fifo.jpg": "is not a regular file",
        "art/cat/line\\nbreak.jpg": "has a name that has control characters",
        "art/cat/caf\\udce9.jpg": "has a name that is not UTF-8",
        "art/loose.png": "is not a folder, and images lie two folders deep",
        "readme.txt": "is not a folder, and images lie two folders deep",
    }


@pytest.mark.fault(9)
def test_links_are_followed_once_and_never_out(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    before = scan(root)
    outside = tmp_path / "outside" / "cat"
    outside.mkdir(parents=True)
    Image.new("L", (8, 8)).save(outside / "0.png")
    links = {
        "a_domain": (root / "art", "is a link to art, which is known already"),
        "loop": (root, "is a link to ., which is known already"),
        "out": (outside.parent, "is a link that leads out of the data folder"),
        "art/a_class": (root / "photo" / "dog", "is a link to photo/dog, which is known already"),
        "art/up": (root, "is a link to ., which is known already"),
        "art/cat/again.png": (root / "photo" / "cat" / "0.png", "is a link to photo/cat/0.png, which is known already"),
        "art/cat/dangling.png": (root / "nothing.png", "is a link that leads nowhere"),
        "art/cat/out.png": (outside / "0.png", "is a link that leads out of the data folder"),
        "art/cat/self.png": (Path("self.png"), "is a link that leads nowhere"),
        "art/cat/up.png": (root, "is a link to ., which is known already"),
    }
    for name, (target, _) in links.items():
        (root / name).symlink_to(target)
    assert scan(root).files == before.files
    assert reasons(root) == {name: reason for name, (_, reason) in links.items()}


@pytest.mark.fault(9)
def test_links_to_what_is_hidden_in_the_root_are_followed(make_folder: Make) -> None:
    root = make_folder("art", "cat dog", images=1)
    store = root / ".store"
    for index in range(3):
        (store / "birds").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(store / "birds" / f"{index}.png")
    Image.new("L", (8, 8), 9).save(store / "one.png")
    (root / "art" / "bird").symlink_to(store / "birds")
    (root / "art" / "cat" / "one.png").symlink_to(store / "one.png")
    (root / "art" / "dog" / "one.png").symlink_to(store / "one.png")
    found = scan(root)
    assert [file.relative for file in found.files] == [
        "art/bird/0.png", "art/bird/1.png", "art/bird/2.png", "art/cat/0.png", "art/cat/one.png", "art/dog/0.png",
    ]  # fmt: skip
    assert reasons(root) == {"art/dog/one.png": "is a link to .store/one.png, which is known already"}


@pytest.mark.fault(9)
def test_many_loops_end_quickly(make_folder: Make) -> None:
    root = make_folder("art", "cat", images=1)
    for index in range(200):
        (root / f"d{index}").symlink_to(root)
        (root / "art" / f"c{index}").symlink_to(root / "art")
    found = scan(root)
    assert len(found.files) == 1
    assert len(found.skipped) == 400


@pytest.mark.fault(10)
def test_empty_folders_are_faults(make_folder: Make) -> None:
    root = make_folder()
    (root / "art" / "bird").mkdir()
    (root / "empty").mkdir()
    faults = scan(root).faults
    assert len(faults) == 2
    assert faults[0] == f"the class folder {root}/art/bird holds no image; add images or remove it"
    assert faults[1] == f"the domain folder {root}/empty has no class folders; expected ROOT/domain/class/image"


@pytest.mark.fault(9)
def test_an_unreadable_folder_is_a_fault(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = make_folder(), os.scandir

    def deny(path: Path) -> object:  # as chmod 000 does to everyone but root
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert scan(root).faults[0] == f"cannot read the folder {root}/art/cat (Permission denied); check its rights"


@pytest.mark.fault(41)
@pytest.mark.parametrize("name", ["new\nline", "tab\there", "bell\a", "para\u2029graph"])
@pytest.mark.parametrize("depth", [0, 1])
def test_folders_with_control_characters_are_faults(make_folder: Make, name: str, depth: int) -> None:
    root = make_folder()
    (root / ("", "art")[depth] / name / "x").mkdir(parents=True)
    (fault,) = scan(root).faults
    assert fault.endswith("has a name that has control characters; rename it")
    assert len(fault.splitlines()) == 1


@pytest.mark.fault(41)
def test_harmless_and_overlong_names(make_folder: Make) -> None:
    odd = ["<script>alert(1)<", "Zoë 写真", "a'b\"c;$(x)", "x" * 255]
    root = make_folder("art", "cat")
    for name in odd:
        (root / "art" / name).mkdir()
        Image.new("L", (8, 8)).save(root / "art" / name / "0.png")
    assert {file.class_name for file in scan(root).files} == {"cat", *odd}
    assert _name_fault("x" * 256) is None
    assert _name_fault("x" * 257) == "is longer than 256 characters"
