"""A table with one array row per image, filled as rows are first asked for."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmeta.errors import ModmetaError
from modmeta.files import crash_point, human_size, sweep, temporary_beside


class RowCache:
    """Rows of one shape, computed once and kept, on disk or in memory.

    On disk it is a folder with two memory-mapped arrays, the rows and a checksum for each. Several
    processes on one machine may fill it at the same time: a row's checksum is set after the row, and
    two processes that compute the same row write the same bytes. A row that does not fit its checksum,
    as a process was killed or the power was cut, is computed again. Pickling it (for workers that are
    spawned) takes no rows along: on disk they are opened again, in memory they are computed again.

    Args:
        path: the folder, made when rows are first asked for; None keeps the rows in memory.
        rows: how many rows there are.
        shape: the shape of one row.
        dtype: the type to store, one that numpy knows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        rows: int,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.rows = rows
        self.shape = tuple(shape)
        self.dtype = dtype
        self._numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self._opened: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the full table in bytes."""
        return self.rows * int(np.prod(self.shape, dtype=np.int64)) * self._numpy_dtype.itemsize

    def get(self, ids: Tensor | np.ndarray | Sequence[int], compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return some rows, computing first those that are missing.

        Args:
            ids: row numbers ``(n,)``, repeats allowed.
            compute: takes the missing row numbers ``(m,)``, int64 and without repeats, and returns
                their rows ``(m, *shape)`` in that order.

        Returns:
            A copy of the rows, ``(n, *shape)``, on the CPU.

        Raises:
            ModmetaError: if the folder holds a table of another shape or type, or the disk is too full.
            IndexError: if a row number is outside the table.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"row numbers {wanted.min()}..{wanted.max()} in a cache of {self.rows} rows")
        table, sums, known = self._open()
        for row in np.unique(wanted[~known[wanted]]):
            known[row] = sums[row] != 0 and sums[row] == _checksum(table[row])
        missing = np.unique(wanted[~known[wanted]])
        if missing.size:
            self.put(missing, compute(torch.from_numpy(missing)))
        return torch.from_numpy(table[wanted])

    def put(self, ids: Tensor | np.ndarray | Sequence[int], rows: Tensor) -> None:
        """Keep some rows that were computed elsewhere.

        Args:
            ids: row numbers ``(n,)``, without repeats.
            rows: their rows ``(n, *shape)``.

        Raises:
            ModmetaError: as in :meth:`get`.
        """
        table, sums, known = self._open()
        places = np.asarray(ids, dtype=np.int64)
        values = rows.detach().to("cpu", self.dtype)
        if values.shape != (places.size, *self.shape):
            raise ValueError(f"computed rows {tuple(values.shape)}, not {(places.size, *self.shape)}")
        for row, value in zip(places, values.numpy(), strict=True):
            table[row] = value
            crash_point("row")
            sums[row] = _checksum(value)
            crash_point("row_end")
        known[places] = True

    def _open(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows, their checksums, and which of them this process has checked or computed."""
        if self._opened is None:
            if self.path is None:
                # Memory of an empty array is claimed page by page, as rows are written.
                table = np.empty((self.rows, *self.shape), self._numpy_dtype)
                sums = np.zeros(self.rows, np.uint32)
            else:
                if not self.path.exists():
                    self._create(self.path)
                table, sums = self._map(self.path / "rows.npy"), self._map(self.path / "sums.npy")
                self._check(table, sums)
            self._opened = table, sums, np.zeros(self.rows, bool)
        return self._opened

    def _create(self, path: Path) -> None:
        full = (self.rows, *self.shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            if self.nbytes > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            building = temporary_beside(path)
            try:
                building.mkdir()
                crash_point("cache_open")
                _reserve(building / "rows.npy", self._numpy_dtype, full)
                crash_point("cache_rows")
                _reserve(building / "sums.npy", np.dtype(np.uint32), (self.rows,))
                crash_point("cache_sums")
                building.rename(path)
                crash_point("cache_end")
            finally:
                shutil.rmtree(building, ignore_errors=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ModmetaError(
                    f"no space left: need {human_size(self.nbytes)} at {path}; choose another cache_dir or a smaller "
                    f"image_size"
                ) from error
            if not path.exists():  # otherwise another process was first, and its table serves as well
                raise ModmetaError(
                    f"cannot make the cache {path} ({error.strerror}); choose another cache_dir"
                ) from error

    def _map(self, file: Path) -> np.ndarray:
        try:
            return np.asarray(np.lib.format.open_memmap(file, "r+"))
        except (OSError, ValueError) as error:
            raise ModmetaError(f"the cache file {file} is damaged ({error}); delete {self.path}") from error

    def _check(self, table: np.ndarray, sums: np.ndarray) -> None:
        expected = (self.rows, *self.shape)
        if table.shape != expected or table.dtype != self._numpy_dtype or sums.shape != (self.rows,):
            raise ModmetaError(
                f"the cache {self.path} holds {table.dtype} rows {table.shape} where {self._numpy_dtype} "
                f"{expected} is wanted; delete it or choose another cache_dir"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def _reserve(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(file, "w+", dtype, shape)
    with file.open("r+b") as stream:
        # Writing to a map on a full disk would kill the process: its space is taken now.
        os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
        os.fsync(stream.fileno())


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(row).data) or 1  # 0 stands for a row that is missing
