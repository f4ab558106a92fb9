"""The automatic choice among execution backends."""

from __future__ import annotations

import pytest
import torch
from test_execution import agree, start, task_loss, tasks, untraceable
from torch._inductor import config

from modmeta.adaptation.execution import EXECUTIONS, Auto, Compiled, Loop, Task, Vmap
from modmeta.errors import ModmetaError


class Slow(Loop):
    """A loop that counts its calls, and takes a second on a clock that stands still for others."""

    calls = 0

    def meta_gradient(self, *arguments: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.calls += 1
        return super().meta_gradient(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "anil", "meta_sgd", "reptile"])
def test_it_equals_the_loop_by_hand_whatever_it_chooses(algorithm: str, norm: str) -> None:
    agree(Auto(), task_loss(algorithm, norm), tasks(3))


@pytest.mark.parametrize(("slow", "chosen"), [("loop", "vmap"), ("vmap", "loop")])
def test_the_fastest_is_chosen_once_and_said_in_one_line(
    slow: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_info", said.append)
    execution, loss, other = Auto(), task_loss("maml", "batch"), Slow()
    execution.candidates = {"loop": Loop(), "vmap": Vmap()} | {slow: other}
    monkeypatch.setattr("modmeta.adaptation.execution.auto.time.perf_counter", lambda: float(other.calls))
    agree(execution, loss, tasks(2))
    assert execution.choice == chosen
    (line,) = said
    assert f"execution {chosen!r} is chosen: " in line
    assert "loop " in line and "vmap " in line and " ms per task" in line  # noqa: PT018 - one line, three parts
    called = other.calls
    agree(execution, loss, tasks(2, queries=3))
    assert other.calls == called


def test_what_cannot_do_a_loss_is_out_and_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_info", said.append)
    execution = Auto()
    agree(execution, untraceable, tasks(2))
    assert execution.choice == "loop"
    assert "vmap is out: the loss cannot be vectorised" in said[0]
    assert "\n" not in said[0]


def test_a_missing_compiler_leaves_compiled_out() -> None:
    execution = Auto(compile=True)
    assert isinstance(execution.candidates["compiled"], Compiled)
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        execution.meta_gradient(lambda parameters, task: (parameters["bias"] ** 2).sum(), start(), tasks(1))
    assert execution.choice in ("loop", "vmap")


def test_what_is_wrong_with_the_loss_itself_is_raised() -> None:
    def broken(parameters: object, task: Task) -> torch.Tensor:
        raise ModmetaError("no support")

    with pytest.raises(ModmetaError, match="no support"):
        Auto().meta_gradient(broken, start(), tasks(1))


def test_a_choice_that_was_made_before_is_not_measured_again() -> None:
    execution, slow = EXECUTIONS.make("auto"), Slow()
    execution.candidates["vmap"] = slow
    execution.choice = "vmap"
    agree(execution, task_loss("anil", "none"), tasks(2))
    assert slow.calls == 1


def test_a_choice_that_the_options_leave_out_is_refused() -> None:
    execution = Auto()
    execution.choice = "compiled"
    with pytest.raises(ModmetaError, match="set compile of execution 'auto'"):
        execution.meta_gradient(task_loss("anil", "none"), start(), tasks(1))
