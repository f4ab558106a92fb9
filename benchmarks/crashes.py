"""Kills every writer of modmeta while it writes, and fills its disk, and counts what is lost.

    python benchmarks/crashes.py --crashes 500 --out runs/benchmark-crashes

Each time a process that was forked writes over what is there, and one of these happens:

- it is killed (SIGKILL) at a known place of the writer, once with the temporary directory on the same file system and
  once on another;
- it is killed after a random time;
- its disk is full when a part of the new file is written: a small tmpfs where it may be mounted, otherwise a faked
  ``os.write``.

Afterwards the old or the new generation must be there, whole, and the same write must succeed once the disk has space,
and sweep what the killed process left. Two writers that are not modmeta's are treated in the same way, to show that
losses would be found. Every number is a count of crashes.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from crash_writers import Writer, unprotected, writers

from modmeta import files
from modmeta.errors import ModmetaError
from modmeta.files import CRASH_AT, write_atomically

FRACTIONS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
KILLED, REFUSED, DONE = "killed", "refused", "done"


@dataclass(frozen=True)
class Crash:
    """One crash and what was found after it.

    Attributes:
        writer: the name of the writer.
        fault: ``point``, ``random`` or ``full disk``.
        detail: where it was, or how much of the space there was.
        outcome: what became of the process: ``killed``, ``refused`` or ``done``.
        loss: what is lost or wrong; empty if nothing is.
    """

    writer: str
    fault: str
    detail: str
    outcome: str
    loss: str


class Harness:
    """Crashes writers in a folder.

    Args:
        folder: where they write.
        elsewhere: a folder on another file system.
        disk: a small file system to fill up; None fakes one.
    """

    def __init__(self, folder: Path, elsewhere: Path, disk: Path | None) -> None:
        self.folder = folder
        self.elsewhere = elsewhere
        self.disk = disk

    def points(self, writer: Writer) -> list[str]:
        """Return every crash point that a third write of ``writer`` passes, such as ``fsync:1``."""
        with self._room(self.folder) as room:
            _generations(writer, room, 2)
            before = dict(os.environ)
            try:
                os.environ[CRASH_AT] = "nowhere"
                files._passed.clear()
                writer.write(room, 2)
            finally:
                os.environ.clear()
                os.environ.update(before)
        found = [f"{name}:{n + 1}" for name, count in files._passed.items() for n in range(count)]
        files._passed.clear()
        return found

    def at_point(self, writer: Writer, point: str, generation: int, elsewhere: bool) -> Crash:
        """Kill a write at a point."""
        with self._room(self.folder) as room:
            _generations(writer, room, generation)
            temporary = self.elsewhere if elsewhere else self.folder
            environment = {CRASH_AT: point, "TMPDIR": str(temporary)}
            outcome, message = _wait(_fork(lambda: writer.write(room, generation), environment))
            where = f"{point}, temporary directory {'elsewhere' if elsewhere else 'on the same disk'}"
            return self._after(writer, room, generation, "point", where, outcome, message)

    def at_random(self, writer: Writer, generation: int, share: float) -> Crash:
        """Kill a write after a share of the time that the write before it took."""
        with self._room(self.folder) as room:
            _generations(writer, room, generation - 1)
            begin = time.perf_counter()
            _wait(_fork(lambda: writer.write(room, generation - 1), {}))
            delay = share * (time.perf_counter() - begin)
            child = _fork(lambda: writer.write(room, generation), {"TMPDIR": str(self.elsewhere)})
            time.sleep(delay)
            os.kill(child[0], signal.SIGKILL)
            outcome, message = _wait(child)
            return self._after(writer, room, generation, "random", f"after {share:.2f} of it", outcome, message)

    def full(self, writer: Writer, generation: int, share: float) -> Crash:
        """Let a write find space for a share of what it needs only."""
        with self._room(self.disk or self.folder) as room:
            _generations(writer, room, generation)
            need = max(file.stat().st_size for file in room.rglob("*") if file.is_file())
            space = int(share * need)

            def write() -> None:
                with _full_disk(self.disk, space):
                    writer.write(room, generation)

            outcome, message = _wait(_fork(write, {"TMPDIR": str(self.elsewhere)}))
            if outcome == REFUSED and writer.protected and "no space left: need" not in message:
                message = f"the message is {message!r}"
            elif outcome == REFUSED:
                message = ""
            if outcome == REFUSED and list(room.glob(".modmeta-*")):
                message = "a temporary file is left"
            return self._after(writer, room, generation, "full disk", f"space for {share:.0%}", outcome, message)

    def _after(
        self, writer: Writer, room: Path, generation: int, fault: str, detail: str, outcome: str, message: str
    ) -> Crash:
        loss = message
        if not loss and fault == "point" and outcome != KILLED:
            loss = f"it was not killed but {outcome}"
        try:
            found = writer.read(room)
            if found not in (generation - 1, generation) or (outcome == DONE and found != generation):
                loss = loss or f"generation {found} is there after writing {generation}"
            _age(room)
            if found == generation - 1:
                writer.write(room, generation)
            writer.write(room, generation + 1)
            if writer.read(room) != generation + 1 or list(room.rglob(".modmeta-*")):
                loss = loss or "writing again does not bring all in order"
        except Exception as error:
            loss = loss or f"{type(error).__name__}: {error}"
        return Crash(writer.name, fault, detail, outcome, loss)

    @contextmanager
    def _room(self, folder: Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=folder) as room:
            yield Path(room)


def run(harness: Harness, chosen: list[Writer], crashes: int, random_: random.Random) -> Iterator[Crash]:
    """Yield at least ``crashes`` crashes: every point of every writer, full disks, and random times for the rest.

    Writes that finished before they were hit come on top.
    """
    made = tried = 0
    for writer in chosen:
        for point in harness.points(writer):
            for elsewhere in (False, True):
                crash = harness.at_point(writer, point, 2, elsewhere)
                made += crash.outcome != DONE
                yield crash
        for share in FRACTIONS:
            crash = harness.full(writer, random_.randrange(1, 4), share)
            made += crash.outcome != DONE
            yield crash
    while made < crashes:
        crash = harness.at_random(chosen[tried % len(chosen)], random_.randrange(2, 6), random_.random())
        made, tried = made + (crash.outcome != DONE), tried + 1
        yield crash


def table(crashes: list[Crash], chosen: list[Writer]) -> str:
    """Return a Markdown table with a row per writer and the losses below it."""
    faults = ("point", "random", "full disk")
    lines = ["| writer | at a point | at a random time | disk full | killed | refused | finished | lost |"]
    lines.append("|---|" + "---:|" * 7)
    for name in [*(writer.name for writer in chosen), "all"]:
        mine = [crash for crash in crashes if name in (crash.writer, "all")]
        by_fault, by_outcome = Counter(c.fault for c in mine), Counter(c.outcome for c in mine)
        numbers = [*(by_fault[f] for f in faults), *(by_outcome[o] for o in (KILLED, REFUSED, DONE))]
        lost = sum(bool(crash.loss) for crash in mine)
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + f" | {lost} |")
    return "\n".join(lines)


@contextmanager
def small_disk(size: str = "32m") -> Iterator[Path | None]:
    """Mount a small tmpfs and yield it; None where that is not allowed."""
    with tempfile.TemporaryDirectory() as place:
        mounted = (
            shutil.which("mount") is not None
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
            ).returncode
        )
        try:
            yield Path(place) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", place], check=True)


@contextmanager
def _full_disk(disk: Path | None, space: int) -> Iterator[None]:
    if disk is not None:
        with (disk / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, max(1, shutil.disk_usage(disk).free - space))
        try:
            yield
        finally:
            (disk / "ballast").unlink()
        return
    left, write = space, os.write

    def short(handle: int, data: bytes) -> int:
        nonlocal left
        if len(data) and left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(handle, data[:left])
        left -= taken
        return taken

    os.write = short  # in a forked process, which ends soon
    try:
        yield
    finally:
        os.write = write


def _generations(writer: Writer, room: Path, number: int) -> None:
    for generation in range(number):
        writer.write(room, generation)


def _age(room: Path) -> None:
    # As if a while had gone by: only then are temporary files swept.
    for path in room.rglob(".modmeta-*"):
        os.utime(path, (time.time() - 120,) * 2)


def _fork(action: Callable[[], object], environment: dict[str, str]) -> tuple[int, int]:
    """Run an action in a forked process; return its number and where it reports."""
    read, report = os.pipe()
    child = os.fork()
    if child:
        os.close(report)
        return child, read
    write, code = os.write, 1
    try:
        os.environ.update(environment)
        tempfile.tempdir = None
        torch.set_num_threads(1)
        action()
        code = 0
    except ModmetaError as error:
        write(report, str(error).encode())
        code = 2
    except BaseException as error:
        write(report, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


def _wait(child: tuple[int, int]) -> tuple[str, str]:
    """Return what became of a forked process, and its message."""
    process, report = child
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with os.fdopen(report, "rb") as stream:
        message = stream.read().decode()
    return {-signal.SIGKILL: KILLED, 2: REFUSED, 0: DONE}.get(status, f"exit {status}"), message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crashes", type=int, default=500)
    parser.add_argument("--others", type=int, default=50, help="crashes of the writers that are not modmeta's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elsewhere", type=Path, default=Path("/dev/shm"), help="a folder on another file system")
    parser.add_argument("--out", default=Path("runs/benchmark-crashes"), type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.elsewhere.stat().st_dev == options.out.stat().st_dev:
        raise SystemExit(f"{options.elsewhere} is on the same file system as {options.out}; give another --elsewhere")
    chosen, others, random_ = writers(), unprotected(), random.Random(options.seed)
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(dir=options.out) as folder,
        tempfile.TemporaryDirectory(dir=options.elsewhere) as elsewhere,
        small_disk() as disk,
    ):
        harness = Harness(Path(folder), Path(elsewhere), disk)
        own = list(run(harness, chosen, options.crashes, random_))
        foreign = list(run(harness, others, options.others, random_))
    head = f"seed {options.seed}, full disk {'faked' if disk is None else 'a small tmpfs'}"
    made = sum(crash.outcome != DONE for crash in own)
    summary = (
        f"{made} crashes of modmeta's writers in {len(own)} writes, {sum(bool(c.loss) for c in own)} with a loss, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    text = f"{summary}; {head}\n\n{table(own, chosen)}\n\nNot modmeta's:\n\n{table(foreign, others)}\n"
    write_atomically(options.out / "table.md", text.encode())
    rows = [vars(crash) for crash in [*own, *foreign]]
    write_atomically(options.out / "crashes.json", (json.dumps(rows, indent=1) + "\n").encode())
    print(text)
    for crash in own:
        if crash.loss:
            print(f"LOST: {crash}")
    return int(any(crash.loss for crash in own))


if __name__ == "__main__":
    sys.exit(main())
