"""The file of rows only grows, and survives a process that was stopped in the middle of a line."""

import math
from pathlib import Path

import compared
import pytest

from modmeta.errors import ModmetaError
from modmeta.evaluation.compare import RowFile


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = compared.rows(compared.settings())
    file = RowFile(tmp_path / "rows.jsonl")
    for row in rows:
        file.append(row)
    assert list(RowFile(file.path).rows.values()) == rows == list(file.rows.values())


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, second = compared.row("a"), compared.row("b")
    for row in (first, second):
        RowFile(path).append(row)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        file = RowFile(path)
        assert list(file.rows.values()) == [first]
        assert path.read_bytes() == whole[:start]
        file.append(second)
        assert path.read_bytes() == whole


def test_damage_elsewhere_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in (compared.row("a"), compared.row("b")):
        RowFile(path).append(row)
    path.write_bytes(b"{" + path.read_bytes())
    with pytest.raises(ModmetaError, match="line 1 is damaged"):
        RowFile(path)


def test_the_first_of_two_equal_rows_counts(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.append(compared.row("a", seconds=1.0))
    file.append(compared.row("a", seconds=2.0))
    assert [row.seconds for row in RowFile(file.path).rows.values()] == [1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_written(value: float, tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    with pytest.raises(ModmetaError, match="system 'a', domain 'neon', 1 shots, episode 0: nll is"):
        file.append(compared.row("a", nll=value))
    assert not file.path.exists()
