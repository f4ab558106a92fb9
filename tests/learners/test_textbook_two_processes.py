"""The metric, memory, amortised, supernet and zero-shot learners train on two processes as on one."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

WORKER = Path(__file__).with_name("ddp_textbook.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a single process and each of two have left their weights."""
    folder = tmp_path_factory.mktemp("ddp")
    for devices in ("1", "2"):
        command = [sys.executable, str(WORKER), str(folder), devices]
        done = subprocess.run(command, cwd=folder, env=tiny.for_ranks(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", ["metric", "memory", "amortized", "supernet", "zero_shot"])
def test_two_processes_end_with_the_weights_of_one(name: str, folder: Path) -> None:
    alone, first, second = (torch.load(folder / f"{name}-{run}.pt", weights_only=True) for run in ("1-0", "2-0", "2-1"))
    assert alone.keys() == first.keys() == second.keys()
    for key, tensor in alone.items():
        assert torch.equal(first[key], second[key]), key
        # Adam divides by the size of a gradient, so rounding shows where that is nearly zero.
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=2e-3, msg=key)
