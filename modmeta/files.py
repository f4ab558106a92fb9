"""The one writer of files: what existed before stays until its successor is on the disk, whole and read back."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modmeta.errors import ModmetaError

CRASH_AT = "MODMETA_CRASH_AT"
"""Environment variable of :func:`crash_point`."""

_TEMPORARY = re.compile(r"\.modmeta-(\d+)-[0-9a-f]{8}\.tmp")
_DEAD = 60.0  # seconds without a change after which the temporary file of a process that is gone is swept
_OLD = 86_400.0  # and after which any is: process numbers are used again, and mean nothing on a shared disk
_BLOCK = 1 << 20
_passed: Counter[str] = Counter()


def write_atomically(path: str | Path, data: bytes | memoryview) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    The new file is on the disk and read back before it takes the old one's place, and the change of name is on the
    disk when this returns: neither a killed process nor a power cut loses the old file without leaving the new one.

    Raises:
        ModmetaError: if it cannot be written, for want of space or for another reason. The old file is as it was.
    """
    target = Path(path)
    data = memoryview(data).cast("B")
    sweep(target.parent)
    crash_point("start")
    with _telling(target, data.nbytes):
        temporary = temporary_beside(target)
        try:
            # Made with the process's own mask, unlike tempfile's, whose files nobody else may read.
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                crash_point("open")
                _write(handle, data, "half")
                crash_point("write")
                os.fsync(handle)
                crash_point("fsync")
                _compare(handle, data)
            finally:
                os.close(handle)
            crash_point("verify")
            os.replace(temporary, target)
            crash_point("replace")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    crash_point("end")


def append(path: str | Path, data: bytes) -> None:
    """Add ``data``, whole lines, to the end of a file.

    A process that is killed meanwhile may leave the beginning of ``data`` there, for :func:`drop_torn_line`.

    Raises:
        ModmetaError: if it cannot be written. The file is as it was.
    """
    target = Path(path)
    with _telling(target, len(data)):
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(handle).st_size
            crash_point("append_start")
            try:
                _write(handle, memoryview(data), "append_half")
                crash_point("append_write")
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
    crash_point("append_end")


def drop_torn_line(path: str | Path) -> list[bytes]:
    """Return the whole lines of a file, and cut off a last one that a killed process left unfinished.

    Returns:
        the lines without their ends; none if there is no file.

    Raises:
        ModmetaError: if it cannot be read.
    """
    target = Path(path)
    try:
        content = target.read_bytes() if target.exists() else b""
        *lines, torn = content.split(b"\n")
        if torn:
            os.truncate(target, len(content) - len(torn))
    except OSError as error:
        raise ModmetaError(f"cannot read {target} ({error.strerror})") from error
    return lines


def temporary_beside(target: Path) -> Path:
    """Return a new name in the folder of ``target`` that tells whose it is, for :func:`sweep`.

    It has to be in the same folder: only within one file system is a change of name atomic.
    """
    return target.parent / f".modmeta-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that processes which are gone left in ``folder``."""
    with suppress(OSError):  # whoever writes next will say what is wrong with the folder
        for entry in os.scandir(folder):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None:
                continue
            with suppress(OSError):  # another process may sweep at the same time
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if age > _OLD or (age > _DEAD and not _alive(int(found[1]))):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)


def crash_point(name: str) -> None:
    """Kill this process here if ``MODMETA_CRASH_AT`` asks for it, as in ``replace:3``: the third time it passes.

    The tests stop writers at known places with it. Unset, it is one look-up in the environment.
    """
    wanted = os.environ.get(CRASH_AT)
    if wanted is not None:
        _passed[name] += 1
        if wanted == f"{name}:{_passed[name]}":
            os.kill(os.getpid(), signal.SIGKILL)


def human_size(size: int) -> str:
    """Return a number of bytes as in ``8.0 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def _telling(target: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModmetaError(
                f"no space left: need {human_size(size)} at {target}; make room and run the command again"
            ) from error
        if not target.parent.is_dir():
            raise ModmetaError(f"cannot write to {target.parent} ({error.strerror}); choose another folder") from error
        raise ModmetaError(f"cannot write {target} ({error.strerror}); choose another place") from error


def _write(handle: int, data: memoryview, half: str) -> None:
    if CRASH_AT in os.environ:  # otherwise in one piece
        middle = data.nbytes // 2
        data = data[os.write(handle, data[:middle]) :]
        crash_point(half)
    while data.nbytes:
        data = data[os.write(handle, data) :]  # a disk that fills up takes a part first


def _compare(handle: int, data: memoryview) -> None:
    with suppress(OSError, AttributeError):
        # Otherwise the kernel would answer from its memory. Some systems cannot be asked.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    for start in range(0, data.nbytes, _BLOCK):
        if os.pread(handle, _BLOCK, start) != data[start : start + _BLOCK]:
            raise OSError(errno.EIO, "what was written reads back as something else")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks have no such thing
            raise
    finally:
        os.close(handle)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is somebody else's
    return True
