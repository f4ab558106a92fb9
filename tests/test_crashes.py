"""A part of ``benchmarks/crashes.py``: writers are killed and their disk is full, and nothing is lost."""

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from crash_writers import writers
from crashes import KILLED, REFUSED, Crash, Harness

from modmeta.files import crash_point

MEMORY = Path("/dev/shm")
WRITERS = {writer.name: writer for writer in writers()}
KINDS = {
    "checkpoint, 80 kB": 9, "checkpoints in turn": 9, "adapter file": 8, "results": 8, "rows of a comparison": 60,
    "metrics": 12, "configuration": 8, "action table": 8, "feature cache": 8, "new caches": 6,
}  # fmt: skip


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    # Where there is a file system in memory, the temporary directory is on another one, and syncing costs nothing.
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as work:
        yield Harness(Path(work), tmp_path, disk=None)


def losses(crashes: list[Crash]) -> list[Crash]:
    return [crash for crash in crashes if crash.loss]


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_writer_loses_nothing(harness: Harness, name: str) -> None:
    points = harness.points(WRITERS[name])
    assert len(points) == KINDS[name]
    few = random.Random(name).sample(points, 4)
    crashes = [harness.at_point(WRITERS[name], point, 2, elsewhere=True) for point in few]
    assert {crash.outcome for crash in crashes} == {KILLED}
    assert not losses(crashes)


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", [name for name in KINDS if "cache" not in name])
def test_a_full_disk_loses_nothing(harness: Harness, name: str) -> None:
    crashes = [harness.full(WRITERS[name], 1, share) for share in (0.0, 0.5)]
    assert crashes[0].outcome == REFUSED
    assert not losses(crashes)


@pytest.mark.fault(19)
def test_a_writer_that_loses_files_is_found_out(harness: Harness) -> None:
    def write(folder: Path, generation: int) -> None:
        text = json.dumps([{"value": generation}])
        for part in (text[:5], text):
            (folder / "results.json").write_text(part)
            crash_point("part")

    naive = replace(WRITERS["results"], write=write)
    assert harness.points(naive) == ["part:1", "part:2"]
    found = [harness.at_point(naive, point, 2, elsewhere=False) for point in ("part:1", "part:2")]
    assert [bool(crash.loss) for crash in found] == [True, False]
