"""The writer of files: whole or not at all, whatever happens meanwhile."""

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modmeta import files
from modmeta.errors import ModmetaError
from modmeta.files import append, drop_torn_line, sweep, write_atomically


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dead_process() -> int:
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_the_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    for content in (b"old", b"", b"new" * 1_000_000):
        write_atomically(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_other_buffers_are_bytes_too(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", memoryview(b"abcdefgh").cast("I"))
    assert (tmp_path / "f").read_bytes() == b"abcdefgh"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_rights_are_those_of_the_mask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "f", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


@pytest.mark.fault(20)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(ModmetaError, match=rf"^no space left: need 8\.0 MB at {path}; make room"):
        write_atomically(path, bytes(8_000_000))
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


@pytest.mark.fault(20)
def test_a_disk_that_fills_up_while_lines_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    append(path, b"one\n")
    write, calls = os.write, []

    def short(handle: int, data: bytes) -> int:
        calls.append(data)
        return write(handle, data[:2]) if len(calls) == 1 else full_disk()

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(ModmetaError, match=r"no space left: need 4 bytes at"):
        append(path, b"two\n")
    assert len(calls) == 2
    assert path.read_bytes() == b"one\n"


@pytest.mark.fault(19)
def test_the_file_and_its_name_are_on_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "f", b"new")
    assert done == ["file", "replace", "folder"]


@pytest.mark.fault(19)
def test_what_reads_back_differently_does_not_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "pread", lambda *_: b"nev")
    with pytest.raises(ModmetaError, match="reads back as something else"):
        write_atomically(tmp_path / "f", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"old")]


@pytest.mark.fault(21)
def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "f", tmp_path / "missing" / "f"):
        with pytest.raises(ModmetaError, match=rf"cannot write to {path.parent} .*choose another folder"):
            write_atomically(path, b"")
    with pytest.raises(ModmetaError, match=r"cannot write .*folder \(Is a directory\)"):
        write_atomically(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.fault(19)
def test_leftovers_of_dead_processes_are_swept(tmp_path: Path) -> None:
    dead, living = dead_process(), os.getpid()
    young, old, very_old = 10, 120, 100_000
    cases = {(dead, young): True, (dead, old): False, (living, old): True, (living, very_old): False}
    names = {}
    for number, ((process, age), stays) in enumerate(cases.items()):
        path = tmp_path / f".modmeta-{process}-{number:08x}.tmp"
        if number % 2:
            path.mkdir()
            (path / "rows.npy").write_bytes(b"part")
        else:
            path.write_bytes(b"part")
        os.utime(path, (time.time() - age,) * 2)
        names[path.name] = stays
    (tmp_path / ".modmeta-notes.tmp").write_bytes(b"a user's")
    write_atomically(tmp_path / "f", b"")
    left = {name for name, stays in names.items() if stays}
    assert {path.name for path in tmp_path.iterdir()} == left | {"f", ".modmeta-notes.tmp"}


def test_sweeping_a_folder_that_is_not_there(tmp_path: Path) -> None:
    sweep(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


@pytest.mark.fault(19)
def test_lines_are_added_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert drop_torn_line(path) == []
    for line in (b"one\n", b"two\nthree\n"):
        append(path, line)
    assert drop_torn_line(path) == [b"one", b"two", b"three"]
    path.write_bytes(path.read_bytes() + b"fou")
    assert drop_torn_line(path) == [b"one", b"two", b"three"]
    assert path.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.fault(19)
def test_a_process_is_killed_at_the_point_that_is_asked_for(tmp_path: Path) -> None:
    script = (
        "import sys; from modmeta.files import write_atomically\n"
        "for text in ('one', 'two', 'three'): write_atomically(sys.argv[1], text.encode())"
    )
    for point, content in {"fsync:2": b"one", "replace:2": b"two", "half:9": b"three"}.items():
        environment = {**os.environ, files.CRASH_AT: point}
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], env=environment, timeout=60)
        assert done.returncode == (0 if point == "half:9" else -9)
        assert (tmp_path / "f").read_bytes() == content


def test_sizes_are_for_people() -> None:
    sizes = [files.human_size(size) for size in (0, 999, 1000, 8_000_000, 2_340_000_000)]
    assert sizes == ["0 bytes", "999 bytes", "1.0 kB", "8.0 MB", "2.3 GB"]
