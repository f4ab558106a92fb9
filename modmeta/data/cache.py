"""A table with one array row per image, filled as rows are first asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmeta.errors import ModmetaError


class RowCache:
    """Rows of one shape, computed once and kept, on disk or in memory.

    On disk it is a folder with two memory-mapped arrays, the rows and a flag for each. Several
    processes on one machine may fill it at the same time: a row's flag is set after the row, and two
    processes that compute the same row write the same bytes. Pickling it (for workers that are
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
        self._opened: tuple[np.ndarray, np.ndarray] | None = None

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
        table, filled = self._open()
        missing = np.unique(wanted[~filled[wanted]])
        if missing.size:
            values = compute(torch.from_numpy(missing)).detach().to("cpu", self.dtype)
            if values.shape != (missing.size, *self.shape):
                raise ValueError(f"computed rows {tuple(values.shape)}, not {(missing.size, *self.shape)}")
            table[missing] = values.numpy()
            filled[missing] = True
        return torch.from_numpy(table[wanted])

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        if self._opened is None:
            if self.path is None:
                # Memory of an empty array is claimed page by page, as rows are written.
                table = np.empty((self.rows, *self.shape), self._numpy_dtype)
                self._opened = table, np.zeros(self.rows, bool)
            else:
                if not self.path.exists():
                    self._create(self.path)
                self._opened = self._map(self.path / "rows.npy"), self._map(self.path / "filled.npy")
                self._check(*self._opened)
        return self._opened

    def _create(self, path: Path) -> None:
        full = (self.rows, *self.shape)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if self.nbytes > free:  # writing to a map on a full disk would kill the process
                raise ModmetaError(
                    f"the cache {path} needs {self.nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f}; "
                    f"choose another cache_dir or a smaller image_size"
                )
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
                building = Path(scratch) / path.name
                building.mkdir()
                np.lib.format.open_memmap(building / "rows.npy", "w+", self._numpy_dtype, full)
                np.lib.format.open_memmap(building / "filled.npy", "w+", np.dtype(bool), (self.rows,))
                building.rename(path)
        except OSError as error:
            if not path.exists():  # otherwise another process was first, and its table serves as well
                raise ModmetaError(
                    f"cannot make the cache {path} ({error.strerror}); choose another cache_dir"
                ) from error

    def _map(self, file: Path) -> np.ndarray:
        try:
            return np.asarray(np.lib.format.open_memmap(file, "r+"))
        except (OSError, ValueError) as error:
            raise ModmetaError(f"the cache file {file} is damaged ({error}); delete {self.path}") from error

    def _check(self, table: np.ndarray, filled: np.ndarray) -> None:
        expected = (self.rows, *self.shape)
        if table.shape != expected or table.dtype != self._numpy_dtype or filled.shape != (self.rows,):
            raise ModmetaError(
                f"the cache {self.path} holds {table.dtype} rows {table.shape} where {self._numpy_dtype} "
                f"{expected} is wanted; delete it or choose another cache_dir"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
