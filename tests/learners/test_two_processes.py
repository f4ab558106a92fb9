"""Two processes are one run: the same episodes, gradients and results, and equal weights on every rank."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(folder: Path, devices: int) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(devices)],
        cwd=folder,
        env=tiny.for_ranks(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a single process saw, and what each of two did."""
    folder = tmp_path_factory.mktemp("ddp")
    for devices in (1, 2):
        run(folder, devices)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not different


def test_the_episodes_of_a_step_are_shared_out(seen: dict[str, dict[str, Any]]) -> None:
    alone, *ranks = (seen[name]["indices"] for name in ("1-0", "2-0", "2-1"))
    assert alone == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for step, first, second in zip(alone, *ranks, strict=True):
        assert not set(first) & set(second)
        assert sorted([*first, *second]) == step


def test_meta_gradients_are_those_of_one_process(seen: dict[str, dict[str, Any]]) -> None:
    alone, first, second = (seen[name]["gradient"] for name in ("1-0", "2-0", "2-1"))
    assert_equal(first, second)
    assert alone.keys() == first.keys()
    assert any(name.startswith("policy.") and bool(g.any()) for name, g in alone.items())
    assert any(name.startswith("bank.") and bool(g.any()) for name, g in alone.items())
    for name, gradient in alone.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_weights_are_those_of_one_process(seen: dict[str, dict[str, Any]]) -> None:
    alone, first, second = (seen[name]["weights"] for name in ("1-0", "2-0", "2-1"))
    assert_equal(first, second)
    # Adam divides by the size of a gradient, so rounding shows where that is nearly zero.
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-3, msg=name)


def test_every_rank_ends_both_phases_with_equal_weights_and_buffers(seen: dict[str, dict[str, Any]]) -> None:
    for what in ("both", "sources"):
        assert_equal(seen["2-0"][what], seen["2-1"][what])
    names = seen["2-0"]["both"]
    assert any("running_mean" in name for name in names)
    assert any(name.startswith("phase.classifier") for name in names)


def test_test_results_are_those_of_one_process(seen: dict[str, dict[str, Any]]) -> None:
    alone = seen["1-0"]["results"]
    assert {r["episodes"] for r in alone} == {3}
    assert seen["2-0"]["results"] == alone
    assert seen["2-1"]["results"] == alone
