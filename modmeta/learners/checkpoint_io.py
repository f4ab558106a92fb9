"""Checkpoints that are never lost: written whole or not at all, with a checksum, and read without running code."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from modmeta.errors import ModmetaError
from modmeta.files import crash_point, sweep, write_atomically

_MARK = b"modmeta-sha256:"
_TRAILER = len(_MARK) + 64
_END_RECORD = b"PK\x05\x06"  # of a zip archive, 22 bytes before a comment whose length are the last two of them
_BLOCK = 1 << 20
_ENDLESS = ("callbacks",)  # Lightning's callbacks start their best score at infinity


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, safely: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    A checkpoint takes the place of another only once it is on the disk and read back. It stays one file that
    ``torch.load`` reads: the SHA-256 of its content is the comment of the zip archive that ``torch.save`` makes.
    Nothing that is not finite gets into one, nor anything that could not be loaded without running code. Files that
    another writer made, without a checksum, can be read, too.
    """

    def __init__(self) -> None:
        self._newest: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what to write.
            path: where to, on a local disk; missing folders are made.
            storage_options: nothing, as there are none.

        Raises:
            ModmetaError: if it holds what is not finite or not plain data, or cannot be written. A checkpoint that
                was at ``path`` before is still there then.
        """
        if storage_options is not None:
            raise ModmetaError("save_checkpoint: AtomicCheckpointIO has no storage_options; leave them out")
        file = _local(path)
        for name in _not_finite(checkpoint):
            raise ModmetaError(f"the checkpoint {file} is not written: {name} is not finite; what was there is kept")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        if foreign := sorted(get_unsafe_globals_in_checkpoint(buffer)):
            raise ModmetaError(
                f"the checkpoint {file} is not written: it holds {', '.join(foreign[:3])}, which cannot be loaded "
                f"without running code; save plain data"
            )
        _add_checksum(buffer)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModmetaError(f"cannot make {file.parent} ({error.strerror}); choose another folder") from error
        crash_point("checkpoint")
        write_atomically(file, buffer.getbuffer())
        self._newest = file

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint as plain data.

        Args:
            path: its file.
            map_location: where tensors go, as for ``torch.load``.
            weights_only: makes no difference: code in a checkpoint is never run.

        Raises:
            ModmetaError: if it is missing, damaged, or holds code.
        """
        return load_plain(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless the one that was written last is damaged by now.

        Args:
            path: its file; it need not exist.
        """
        file = _local(path)
        if self._newest is not None and self._newest != file:
            try:
                with self._newest.open("rb") as stream:
                    _check(stream, self._newest)
            except (OSError, ModmetaError) as error:
                rank_zero_warn(f"{file} is kept, as the newer checkpoint cannot be read: {error}")
                return
        file.unlink(missing_ok=True)
        sweep(file.parent)


def load_plain(path: str | Path, map_location: Any | None = "cpu") -> dict[str, Any]:
    """Read a checkpoint file of any Lightning trainer as plain data, after its checksum if it has one.

    Raises:
        ModmetaError: if it is missing, damaged, or holds code.
    """
    file = _local(path)
    if not file.is_file():
        raise ModmetaError(f"checkpoint {file} does not exist; give the .ckpt file of a run's checkpoints folder")
    try:
        with file.open("rb") as stream:
            _check(stream, file)
            stream.seek(0)
            checkpoint = torch.load(stream, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0][:120]
        raise ModmetaError(f"checkpoint {file} cannot be read ({reason}); give another one") from error
    if not isinstance(checkpoint, dict):
        raise ModmetaError(f"checkpoint {file} was not written by a trainer; give the .ckpt file of a run")
    return checkpoint


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise ModmetaError(f"checkpoint {path}: AtomicCheckpointIO needs a local disk; give Lightning's own plugin")
    return Path(path)


def _add_checksum(buffer: io.BytesIO) -> None:
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_TRAILER.to_bytes(2, "little") + _MARK)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(digest.encode())


def _check(stream: IO[bytes], file: Path) -> None:
    """Compare a file with its checksum; a file without one passes, as long as it is a whole zip archive.

    Raises:
        ModmetaError: if it was changed or is incomplete.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - _TRAILER - 22))
    end = stream.read()
    if len(end) > _TRAILER and end.startswith(_END_RECORD):
        stream.seek(0)
        digest, left = hashlib.sha256(), size - 64
        while left > 0:
            block = stream.read(min(_BLOCK, left))
            digest.update(block)
            left -= len(block)
        if end[22:] != _MARK + digest.hexdigest().encode():
            raise ModmetaError(f"checkpoint {file} is damaged: its checksum does not fit; give another one")
    elif end[-22:-18] != _END_RECORD or end[-2:] != b"\0\0":
        raise ModmetaError(f"checkpoint {file} cannot be read (it is incomplete or no checkpoint); give another one")


def _not_finite(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of numbers and tensors that are not finite, such as ``state_dict['head.weight']``."""
    for key, value in checkpoint.items():
        wrong: Callable[[Tensor], Tensor] = torch.isnan if key in _ENDLESS else _is_not_finite
        yield from _search(value, str(key), wrong)


def _search(value: Any, name: str, wrong: Callable[[Tensor], Tensor]) -> Iterator[str]:
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and bool(wrong(value).any()):
            yield name
    elif isinstance(value, float):
        if math.isnan(value):  # an infinite setting, such as a scheduler's best loss so far, is one on purpose
            yield name
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _search(each, f"{name}[{key!r}]", wrong)
    elif isinstance(value, (list, tuple)):
        for position, each in enumerate(value):
            yield from _search(each, f"{name}[{position}]", wrong)


def _is_not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)
