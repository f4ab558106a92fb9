"""The gradient family on two processes ends where it does on one."""

import subprocess
import sys
from pathlib import Path

import ddp_family_worker
import family
import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp_family")
    ddp_family_worker.main(folder, 1)
    done = subprocess.run(
        [sys.executable, ddp_family_worker.__file__, str(folder), "2"],
        cwd=folder,
        env=tiny.for_ranks(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_two_processes_learn_what_one_does(name: str, folder: Path) -> None:
    alone, first, second = (torch.load(folder / f"{run}.pt", weights_only=True)[name] for run in ("1-0", "2-0", "2-1"))
    fresh = (family.gradient(steps=2) if name == "maml" else family.reptile()).parameters_by_name()
    assert alone.keys() == first.keys() == fresh.keys()
    for key, tensor in alone.items():
        assert torch.equal(first[key], second[key])
        # Adam divides by the size of a gradient, so rounding shows where that is nearly zero.
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=2e-3 if name == "maml" else 1e-6, msg=key)
    assert any(not torch.allclose(tensor, fresh[key], atol=1e-4) for key, tensor in alone.items())
