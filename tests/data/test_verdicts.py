from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modmeta.data.inspect import Inspection, inspect_file
from modmeta.data.scan import ImageFile, scan
from modmeta.data.verdicts import read_verdicts, write_verdicts

Make = Callable[..., Path]


def known(root: Path) -> dict[ImageFile, Inspection]:
    return {file: inspect_file(root, file) for file in scan(root).files}


def test_verdicts_come_back_as_they_were(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    (root / "art" / "cat" / "0.png").write_bytes(b"no image")
    verdicts = known(root)
    write_verdicts(tmp_path / "v.jsonl", verdicts)
    assert read_verdicts(tmp_path / "v.jsonl", list(verdicts)) == verdicts
    assert sum(found.verdict == "quarantined" for found in verdicts.values()) == 1


def test_changed_new_and_removed_files_have_no_verdict(make_folder: Make, tmp_path: Path) -> None:
    verdicts = known(make_folder())
    write_verdicts(tmp_path / "v.jsonl", verdicts)
    first, second, third, _, *rest = verdicts
    asked = [
        replace(first, changed_ns=first.changed_ns + 1),
        replace(second, size=second.size + 1),
        replace(third, name="new.png"),
        *rest,
    ]
    assert list(read_verdicts(tmp_path / "v.jsonl", asked)) == rest


def test_what_could_not_be_read_is_looked_at_again(make_folder: Make, tmp_path: Path) -> None:
    verdicts = known(make_folder())
    first = next(iter(verdicts))
    denied = replace(
        verdicts[first], verdict="quarantined", reason="cannot be read (Permission denied)", bytes_sha256=None
    )
    write_verdicts(tmp_path / "v.jsonl", verdicts | {first: denied})
    assert set(verdicts) - set(read_verdicts(tmp_path / "v.jsonl", list(verdicts))) == {first}


def test_without_a_file_nothing_is_known(tmp_path: Path) -> None:
    assert read_verdicts(tmp_path / "v.jsonl", [ImageFile("a", "b", "c.png", 1, 2)]) == {}


@pytest.mark.fault(19)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_lines_are_left_out(make_folder: Make, tmp_path: Path, data: st.DataObject) -> None:
    verdicts = known(make_folder("art", "cat", images=2))
    path = tmp_path / "v.jsonl"
    write_verdicts(path, verdicts)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut] + data.draw(st.binary(max_size=30)))
    found = read_verdicts(path, list(verdicts))
    assert set(found.items()) <= set(verdicts.items())


@pytest.mark.parametrize("line", ["[]", "3", "null", "{}", '{"notes": 1, "changed_ns": 2}', '{"notes": [], "x": 1}'])
def test_foreign_lines_are_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "v.jsonl").write_text(line + "\n")
    assert read_verdicts(tmp_path / "v.jsonl", [ImageFile("a", "b", "c.png", 1, 2)]) == {}
