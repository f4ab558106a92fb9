"""Depth and strength of statistics: which are taken, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modmeta.adaptation import Plan, tune_statistics

UNITS = ("blend@s0", "blend@s1", "film@s1")
READING = UNITS[:2]


def plan_of(*gates: float) -> Plan:
    rows = len(UNITS)
    one = torch.ones(())
    rates, bank = torch.full((rows, 2), 0.01), torch.ones(rows, 1)
    return Plan(UNITS, torch.tensor(gates), rates, torch.zeros(rows), bank, one, one, one)


def losses_by(gain: Mapping[float, list[float]]) -> Callable[[Plan | None], Tensor]:
    """Return losses that fall from 1 by the gains of each factor on the first unit's gate of 0.2."""

    def losses(plan: Plan | None) -> Tensor:
        if plan is None:
            return torch.ones(2)
        assert set(plan.gate_of()) <= set(READING)
        return 1.0 - torch.tensor(gain[round(float(plan.gates[0]) / 0.2, 3)])

    return losses


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.floats(0.01, 1), st.sampled_from(["0", "1"]))
def test_the_best_factor_is_taken_if_it_is_surely_better(gains: list[float], spread: float, stands: str) -> None:
    low, own, high = gains
    known = {0.5: [low - spread, low + spread], 1.0: [own, own], 2.0: [high - spread, high + spread]}
    losses = losses_by(known)
    plan, _, told = tune_statistics({1.0: plan_of(0.2, 0.1, 0.7)}, READING, [0.5, 2.0, 0.0], losses, float(stands))
    assert told == pytest.approx({"0": 0.0, "0.5": low, "1": own, "2": high}, abs=1e-5)
    best = max(told, key=lambda name: told[name])
    error = 0.0 if best in ("0", "1") else spread  # of the mean of two
    if abs(told[best] - told[stands] - error) < 1e-4:
        return  # rounding decides
    expected = float(best) if told[best] - told[stands] > error else float(stands)
    torch.testing.assert_close(plan.gates[:2], expected * torch.tensor([0.2, 0.1]))
    assert float(plan.gates[2]) == pytest.approx(0.7)


def test_gates_stay_within_one() -> None:
    known = {1.0: [0.0, 0.0], 3.0: [0.1, 0.1]}
    plan, _, _ = tune_statistics({1.0: plan_of(0.2, 0.6, 0.7)}, READING, [3.0], losses_by(known))
    assert plan.gates.tolist() == pytest.approx([0.6, 1.0, 0.7])


def test_a_gain_that_is_not_finite_is_never_taken() -> None:
    nan, inf = float("nan"), float("inf")
    for own in ([nan, nan], [0.0, 0.0]):
        known = {1.0: own, 2.0: [inf, 0.0], 3.0: [0.2, 0.2]}
        plan, _, told = tune_statistics({1.0: plan_of(0.2, 0.1, 0.7)}, READING, list(known), losses_by(known))
        assert set(told) <= {"1", "3"}
        assert plan.gates.tolist() == pytest.approx([0.6, 0.3, 0.7])
    blind = {factor: [nan, nan] for factor in known}
    plan, _, told = tune_statistics({1.0: plan_of(0.2, 0.1, 0.7)}, READING, list(known), losses_by(blind))
    assert told == {}
    assert plan.gates.tolist() == pytest.approx([0.2, 0.1, 0.7])


def test_none_can_stand_without_being_named() -> None:
    for gain, gates in ((-0.1, [0.0, 0.0, 0.7]), (0.1, [0.2, 0.1, 0.7])):
        tried = tune_statistics({1.0: plan_of(0.2, 0.1, 0.7)}, READING, [], losses_by({1.0: [gain, gain]}), 0.0)
        assert tried[0].gates.tolist() == pytest.approx(gates)
        assert tried[2] == pytest.approx({"0": 0.0, "1": gain})


def test_closed_statistics_are_not_tried() -> None:
    def never(plan: Plan | None) -> Tensor:
        raise AssertionError("nothing to measure")

    closed = plan_of(0.0, 0.0, 0.7)
    assert tune_statistics({1.0: closed}, READING, [1.0, 2.0], never) == (closed, {}, {})


def gains_at(plan: Plan | None, gains: Mapping[tuple[bool, float], list[float]]) -> Tensor:
    """Return losses that fall from 1 by the gains of whether the second unit is read, and of the first one's factor."""
    if plan is None:
        return torch.ones(2)
    return 1.0 - torch.tensor(gains[float(plan.gates[1]) > 0, round(float(plan.gates[0]) / 0.2, 3)])


@pytest.mark.parametrize(
    ("deep", "gates"),
    [
        ([0.3, 0.4], [0.4, 0.2, 0.7]),  # surely better than 0.1, and so is its factor of 2
        ([-0.4, 0.8], [0.2, 0.0, 0.7]),  # better on average, by less than its error: the first depth stands
        ([0.0, 0.0], [0.2, 0.0, 0.7]),
        ([float("nan"), 0.0], [0.2, 0.0, 0.7]),
    ],
)
def test_the_first_depth_stands_unless_another_is_surely_better(deep: list[float], gates: list[float]) -> None:
    gains = {(False, 1.0): [0.1, 0.1], (False, 2.0): [0.0, 0.0], (True, 1.0): deep, (True, 2.0): [0.9, 0.9]}
    plans = {0.5: plan_of(0.2, 0.0, 0.7), 1.0: plan_of(0.2, 0.1, 0.7)}
    plan, depths, strengths = tune_statistics(plans, READING, [0.0, 2.0], lambda plan: gains_at(plan, gains))
    known = {"0.5": 0.1, "1": sum(deep) / 2}
    assert depths == pytest.approx({name: gain for name, gain in known.items() if gain == gain})
    assert plan.gates.tolist() == pytest.approx(gates)
    taken = gates[1] > 0
    assert strengths == pytest.approx({"0": 0.0, "1": 0.35 if taken else 0.1, "2": 0.9 if taken else 0.0}, abs=1e-5)


def test_a_first_depth_without_statistics_can_be_left_for_a_deeper_one() -> None:
    plans = {0.0: plan_of(0.0, 0.0, 0.7), 1.0: plan_of(0.2, 0.1, 0.7)}
    for gain, gates in ((0.3, [0.4, 0.2, 0.7]), (-0.3, [0.0, 0.0, 0.7])):
        gains = {(True, 1.0): [gain, gain], (True, 2.0): [2 * gain, 2 * gain]}
        plan, depths, _ = tune_statistics(plans, READING, [2.0], lambda plan, gains=gains: gains_at(plan, gains))
        assert depths == pytest.approx({"0": 0.0, "1": gain})
        assert plan.gates.tolist() == pytest.approx(gates)
