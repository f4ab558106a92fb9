import errno
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modmeta.data.cache import RowCache
from modmeta.errors import ModmetaError


def squares(ids: Tensor) -> Tensor:
    return (ids.float() ** 2).unsqueeze(1).expand(-1, 3)


def refuse(ids: Tensor) -> Tensor:
    raise AssertionError(f"rows {ids.tolist()} are computed again")


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows_are_computed_once(tmp_path: Path, on_disk: bool) -> None:
    cache = RowCache(tmp_path / "c" if on_disk else None, 10, (3,))
    asked: list[int] = []

    def compute(ids: Tensor) -> Tensor:
        asked.extend(ids.tolist())
        return squares(ids)

    rows = cache.get([4, 2, 4], compute)
    assert torch.equal(rows, squares(torch.tensor([4, 2, 4])))
    assert torch.equal(cache.get(torch.tensor([2, 9]), compute), squares(torch.tensor([2, 9])))
    assert asked == [2, 4, 9]


def test_rows_are_copies(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "c", 10, (3,))
    cache.get([1], squares).zero_()
    assert cache.get([1], refuse).sum() == 3


def test_nothing_asked_for(tmp_path: Path) -> None:
    assert RowCache(None, 10, (3,)).get([], refuse).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
def test_type_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    assert RowCache(tmp_path / "c", 10, (3,), dtype).get([3], squares).dtype == dtype


def test_reopened_and_pickled(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "c", 1000, (3,))
    rows = cache.get([7], squares)
    assert torch.equal(RowCache(tmp_path / "c", 1000, (3,)).get([7], refuse), rows)
    packed = pickle.dumps(cache)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed).get([7], refuse), rows)


def test_a_failed_computation_leaves_no_rows(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "c", 10, (3,))
    with pytest.raises(AssertionError):
        cache.get([1], refuse)
    assert torch.equal(cache.get([1], squares), torch.ones(1, 3))


@pytest.mark.parametrize("ids", [[-1], [10]])
def test_rows_outside_are_refused(ids: list[int]) -> None:
    with pytest.raises(IndexError):
        RowCache(None, 10, (3,)).get(ids, squares)


def test_wrongly_shaped_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="computed rows"):
        RowCache(None, 10, (2,)).get([1], squares)


@pytest.mark.parametrize(("rows", "dtype"), [(11, torch.float32), (10, torch.float16)])
def test_another_table_is_refused(tmp_path: Path, rows: int, dtype: torch.dtype) -> None:
    RowCache(tmp_path / "c", 10, (3,)).get([1], squares)
    with pytest.raises(ModmetaError, match="is wanted; delete it"):
        RowCache(tmp_path / "c", rows, (3,), dtype).get([1], squares)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    RowCache(tmp_path / "c", 10, (3,)).get([1], squares)
    (tmp_path / "c" / "rows.npy").write_bytes(b"junk")
    with pytest.raises(ModmetaError, match=r"rows\.npy is damaged"):
        RowCache(tmp_path / "c", 10, (3,)).get([1], squares)


def test_a_table_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModmetaError, match=r"no space left: need 4000000\.0 GB at .*; choose another cache_dir"):
        RowCache(tmp_path / "c", 10**12, (10**3,)).get([1], squares)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModmetaError, match=r"cannot make the cache .*; choose another cache_dir"):
        RowCache(tmp_path / "file" / "c", 10, (3,)).get([1], squares)


@pytest.mark.fault(20)
def test_the_disk_space_is_taken_before_a_row_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RowCache(tmp_path / "c", 1000, (1000,)).get([1], lambda ids: torch.ones(1, 1000))
    assert (tmp_path / "c" / "rows.npy").stat().st_blocks * 512 >= 4_000_000

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModmetaError, match=r"no space left: need 4\.0 MB at "):
        RowCache(tmp_path / "d", 1000, (1000,)).get([1], squares)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.fault(19, 26)
def test_a_damaged_row_is_computed_again(tmp_path: Path) -> None:
    RowCache(tmp_path / "c", 10, (3,)).get([1, 2], squares)
    file = tmp_path / "c" / "rows.npy"
    data = bytearray(file.read_bytes())
    data[-(10 - 2) * 3 * 4] ^= 1  # in row 2
    file.write_bytes(data)
    asked: list[int] = []

    def compute(ids: Tensor) -> Tensor:
        asked.extend(ids.tolist())
        return squares(ids)

    rows = RowCache(tmp_path / "c", 10, (3,)).get([1, 2], compute)
    assert asked == [2]
    assert torch.equal(rows, squares(torch.tensor([1, 2])))


def fill(path: Path, start: int) -> None:
    cache = RowCache(path, 200, (3,))
    for row in (np.arange(200) + start) % 200:
        cache.get([int(row)], squares)


def test_two_processes_fill_one_table(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path / "c", start)) for start in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    rows = RowCache(tmp_path / "c", 200, (3,)).get(range(200), refuse)
    assert torch.equal(rows, squares(torch.arange(200)))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
