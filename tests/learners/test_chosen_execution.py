"""The execution backend that a run has chosen belongs to the run: resumed, and on all ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from traced import fit

from modmeta.adaptation.execution import Auto
from modmeta.adapters import UnitConfig
from modmeta.learners import GradientLearner


def learner() -> GradientLearner:
    torch.manual_seed(0)
    units = (UnitConfig("film", group="stage"),)
    return GradientLearner(tiny.BACKBONE, units, ways=3, execution="auto", learning_rate=1e-2)


def measured(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    def seconds(self: Auto, *arguments: object) -> tuple[dict[str, float], list[str]]:
        return {name: 1.0 + (name != fastest) for name in self.candidates}, []

    monkeypatch.setattr(Auto, "_measure", seconds)


def test_a_resumed_run_stays_with_the_choice_and_ends_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, "vmap")
    whole = fit(tmp_path, learner(), keep=True)
    measured(monkeypatch, "loop")
    resumed = learner()
    assert fit(tmp_path, resumed, resume=next(file for file in whole.files if file.stem == "step-3")).ends_like(whole)
    assert isinstance(resumed.execution, Auto)
    assert resumed.execution.choice == "vmap"


_RANK = """
import sys, torch
from datetime import timedelta
from modmeta.adaptation.execution import Auto
rank, folder = int(sys.argv[1]), sys.argv[2]
store = torch.distributed.FileStore(folder + "/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
Auto._measure = lambda self, *_: ({"loop": 1.0 + (rank == 0), "vmap": 1.0 + (rank == 1)}, [])
auto = Auto()
auto.meta_gradient(lambda p, t: (p["w"] * t["x"]).sum(), {"w": torch.ones(2)}, [{"x": torch.ones(2)}])
print(auto.choice)
"""


def test_all_ranks_take_what_the_first_has_measured(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path)],
            env=tiny.for_ranks(), stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=120)[0].split() for rank in ranks] == [["vmap"], ["vmap"]]
