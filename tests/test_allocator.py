"""Freed memory is kept for the next pass: by our own command line, never by what others import."""

import platform
import subprocess
import sys

import pytest

from modmeta import cli
from modmeta.allocator import keep_freed_memory
from modmeta.errors import ModmetaError


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_can_be_kept() -> None:
    code = """
from pathlib import Path
import torch
from modmeta.allocator import keep_freed_memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
keep_freed_memory()
torch.ones(1 << 24)
first = held()
x = torch.ones(1 << 24)
del x
assert held() > first - (1 << 20), "it was given back"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_c_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", ""))
    with pytest.raises(ModmetaError, match="glibc"):
        keep_freed_memory()


def test_only_the_command_line_of_the_process_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: asked.append(1))
    monkeypatch.setattr(sys, "argv", ["modmeta", "--version"])
    assert cli.main(["--version"]) == 0
    assert not asked
    assert cli.main() == 0
    assert asked == [1]


def test_a_command_line_does_without_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(sys, "argv", ["modmeta", "--version"])
    assert cli.main() == 0
