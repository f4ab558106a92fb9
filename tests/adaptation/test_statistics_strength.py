"""The strength of statistics: which factor is taken, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modmeta.adaptation import Plan, tune_statistics

UNITS = ("blend@s0", "blend@s1", "film@s1")
READING = UNITS[:2]


def plan_of(*gates: float) -> Plan:
    rows = len(UNITS)
    one = torch.ones(())
    rates, bank = torch.full((rows, 2), 0.01), torch.ones(rows, 1)
    return Plan(UNITS, torch.tensor(gates), rates, torch.zeros(rows), bank, one, one, one)


def loss_by(gain: Mapping[float, float]) -> Callable[[Plan | None], float]:
    """Return a loss that falls from 1 by the gain of each factor on the first unit's gate of 0.2."""

    def loss(plan: Plan | None) -> float:
        if plan is None:
            return 1.0
        assert set(plan.gate_of()) <= set(READING)
        return 1.0 - gain[round(float(plan.gates[0]) / 0.2, 3)]

    return loss


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_factor_of_the_largest_gain_is_taken(gains: list[float]) -> None:
    known = {0.0: 0.0} | dict(zip([0.5, 1.0, 2.0], gains, strict=True))
    plan, told = tune_statistics(plan_of(0.2, 0.1, 0.7), READING, list(known), loss_by(known))
    assert told == pytest.approx({f"{factor:g}": gain for factor, gain in known.items()}, abs=1e-9)
    best = float(max(told, key=lambda name: told[name]))
    torch.testing.assert_close(plan.gates[:2], best * torch.tensor([0.2, 0.1]))
    assert float(plan.gates[2]) == pytest.approx(0.7)


def test_gates_stay_within_one() -> None:
    plan, _ = tune_statistics(plan_of(0.2, 0.6, 0.7), READING, [3.0], loss_by({3.0: 0.1}))
    assert plan.gates.tolist() == pytest.approx([0.6, 1.0, 0.7])


def test_a_gain_that_is_not_finite_is_never_taken() -> None:
    gains = {1.0: float("nan"), 2.0: float("inf"), 3.0: -0.2}
    plan, told = tune_statistics(plan_of(0.2, 0.1, 0.7), READING, list(gains), loss_by(gains))
    assert set(told) == {"3"}
    assert plan.gates.tolist() == pytest.approx([0.6, 0.3, 0.7])
    blind = dict.fromkeys(gains, float("nan"))
    plan, told = tune_statistics(plan_of(0.2, 0.1, 0.7), READING, list(gains), loss_by(blind))
    assert told == {}
    assert plan.gates.tolist() == pytest.approx([0.2, 0.1, 0.7])


def test_closed_statistics_are_not_tried() -> None:
    def never(plan: Plan | None) -> float:
        raise AssertionError("nothing to measure")

    closed = plan_of(0.0, 0.0, 0.7)
    assert tune_statistics(closed, READING, [1.0, 2.0], never) == (closed, {})
