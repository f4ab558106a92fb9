"""The veto keeps the prior when plans hurt, takes them when they help, and prefers the cheaper of equals."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import (
    PRIOR,
    Plan,
    TrackRecord,
    Trial,
    candidates,
    judge,
    stratified_folds,
    tempered_losses,
)

NAMES = ("statistics", "plan/3", "plan")


def plan(gates: tuple[float, ...] = (0.5, 0.5), units: tuple[str, ...] = ("blend", "film")) -> Plan:
    count, zero = len(units), torch.tensor(0.0)
    rates = torch.full((count, 2), 0.03)
    return Plan(units, torch.tensor(gates), rates, torch.zeros(count), torch.ones(count, 1), zero + 1, zero, zero)


def labels_of(shots: int = 8, ways: int = 4) -> Tensor:
    return torch.arange(ways).repeat_interleave(shots)


def predictor(
    quality: dict[str | None, float], labels: Tensor, plans: dict[str, Plan], noise: float = 0.3
) -> Callable[[Plan | None, Tensor, Tensor], Tensor]:
    """Return a stand-in for adapting and predicting: logits that get better with a candidate's quality."""
    shared = noise * torch.randn(len(labels), int(labels.max()) + 1, generator=torch.Generator().manual_seed(0))

    def predict(candidate: Plan | None, rest: Tensor, fold: Tensor) -> Tensor:
        assert not set(rest.tolist()) & set(fold.tolist())
        name = next((n for n, p in plans.items() if p is candidate), None)
        own = torch.Generator().manual_seed(1 + NAMES.index(name) if name else 0)
        mine = 0.05 * torch.randn(shared.shape, generator=own)
        return (quality[name] * F.one_hot(labels, shared.shape[1]) + shared + mine)[fold]

    return predict


def verdict_on(quality: dict[str | None, float], gain: float = 0.0, deviation: float = 0.5, **options: float) -> str:
    labels, plans = labels_of(), {name: plan() for name in NAMES}
    predict = predictor(quality, labels, plans)
    return judge(plans, labels, False, predict, gain=gain, gain_deviation=deviation, **options).choice  # type: ignore[arg-type]


def test_plans_that_hurt_are_refused() -> None:
    assert verdict_on({None: 2.0, "statistics": 1.0, "plan/3": 0.7, "plan": 0.2}) == PRIOR


def test_a_plan_that_clearly_helps_is_taken() -> None:
    assert verdict_on({None: 0.3, "statistics": 0.3, "plan/3": 0.8, "plan": 2.5}) == "plan"
    assert verdict_on({None: 0.3, "statistics": 2.5, "plan/3": 0.3, "plan": 0.3}) == "statistics"


def test_the_cheapest_within_one_error_wins() -> None:
    assert verdict_on({None: 0.3, "statistics": 2.0, "plan/3": 2.0, "plan": 2.0}) == "statistics"
    assert verdict_on({None: 0.3, "statistics": 1.0, "plan/3": 2.0, "plan": 2.0}) == "plan/3"


def test_evidence_outweighs_a_forecast_and_a_sure_forecast_outweighs_evidence() -> None:
    harmful = {None: 2.0, "statistics": 0.5, "plan/3": 0.5, "plan": 0.5}
    assert verdict_on(harmful, gain=0.5, deviation=1.0) == PRIOR
    assert verdict_on(harmful, gain=0.5, deviation=1e-4) != PRIOR


def test_more_caution_asks_for_more() -> None:
    slight = {None: 1.0, "statistics": 1.05, "plan/3": 1.1, "plan": 1.15}
    assert verdict_on(slight, caution=0.0) != PRIOR
    assert verdict_on(slight, caution=100.0) == PRIOR


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("which", [("plan",), ("statistics", "plan"), NAMES])
def test_what_is_not_finite_is_never_chosen(broken: float, which: tuple[str, ...]) -> None:
    labels, plans = labels_of(), {name: plan() for name in NAMES}
    quality: dict[str | None, float] = {None: 0.3} | dict.fromkeys(NAMES, 2.0)
    sound = predictor(quality, labels, plans)

    def predict(candidate: Plan | None, rest: Tensor, fold: Tensor) -> Tensor:
        logits = sound(candidate, rest, fold)
        return logits * broken if any(plans[name] is candidate for name in which) else logits

    verdict = judge(plans, labels, False, predict, gain=5.0, gain_deviation=0.01)
    assert verdict.choice not in which
    assert set(verdict.gains) == set(NAMES) - set(which)
    assert all(math.isfinite(value) for value in [*verdict.gains.values(), *verdict.errors.values()])
    assert (verdict.choice == PRIOR) == (which == NAMES)


def test_nothing_is_adapted_when_the_prior_itself_is_not_finite_or_nothing_is_offered() -> None:
    labels, plans = labels_of(), {"plan": plan()}
    verdict = judge(
        plans, labels, False, lambda p, rest, fold: torch.full((len(fold), 4), math.nan), gain=1.0, gain_deviation=0.1
    )
    assert verdict.choice == PRIOR
    none = judge({}, labels, False, lambda p, rest, fold: torch.zeros(len(fold), 4), gain=1.0, gain_deviation=0.1)
    assert (none.choice, none.gains, none.evidence) == (PRIOR, {}, 0)


@pytest.mark.fault(11)
@pytest.mark.parametrize("labels", [None, torch.arange(4)])
def test_without_evidence_the_forecast_decides(labels: Tensor | None) -> None:
    def predict(candidate: Plan | None, rest: Tensor, fold: Tensor) -> Tensor:
        raise AssertionError("there is nothing to leave out")

    plans = {"plan": plan()}
    for gain, expected in ((0.3, "plan"), (-0.3, PRIOR), (0.05, PRIOR)):
        verdict = judge(plans, labels, False, predict, gain=gain, gain_deviation=0.1)
        assert (verdict.choice, verdict.evidence) == (expected, 0)
        assert verdict.gains == {"plan": pytest.approx(gain)}


@pytest.mark.parametrize(
    ("shots", "quality", "choice"), [(1, 2.5, PRIOR), (8, 2.5, "plan"), (8, 0.2, PRIOR)], ids=["none", "good", "bad"]
)
def test_a_record_of_known_classes_vouches_for_no_forecast_of_new_ones(shots: int, quality: float, choice: str) -> None:
    record = TrackRecord()
    record.fit([Trial(domain, True, 5, 0.4, {}, {"plan": 0.5}) for domain in "aabb"])
    labels, plans = labels_of(shots), {"plan": plan()}
    predict = predictor({None: 1.0, "plan": quality}, labels, plans)
    known, new = (
        judge(plans, labels, anchored, predict, gain=0.5, gain_deviation=0.1, record=record)
        for anchored in (True, False)
    )
    assert known.choice == "plan"
    assert new.choice == choice


def test_a_label_free_plan_is_judged_on_the_whole_support_and_needs_no_folds() -> None:
    labels, plans = labels_of(), {name: plan() for name in ("statistics", "plan")}
    quality = {"statistics": 2.0, "plan": 0.1, None: 0.3}
    folds = predictor(quality, labels, plans)
    everyone, nobody = torch.arange(len(labels)), torch.zeros(0, dtype=torch.long)
    asked: list[str | None] = []

    def predict(candidate: Plan | None, rest: Tensor, fold: Tensor) -> Tensor:
        assert candidate is not plans["statistics"]
        return folds(candidate, rest, fold)

    def held_out(candidate: Plan | None) -> Tensor:
        assert candidate is not plans["plan"]
        asked.append(None if candidate is None else "statistics")
        return folds(candidate, nobody, everyone)

    options = {"gain": 0.0, "gain_deviation": 10.0, "held_out": held_out, "label_free": ["statistics"]}
    verdict = judge(plans, labels, False, predict, **options)  # type: ignore[arg-type]
    assert asked == [None, "statistics"]
    assert verdict.choice == "statistics"
    seen = tempered_losses(held_out(None), labels) - tempered_losses(held_out(plans["statistics"]), labels)
    assert verdict.gains["statistics"] == pytest.approx(float(seen.mean()), rel=1e-3)
    assert verdict.evidence == len(labels)


def test_the_gains_of_folds_and_of_left_out_images_are_paired_image_by_image() -> None:
    # The plan is a little better on each image, while images differ a lot: only a paired difference shows it.
    labels, plans = labels_of(), {name: plan() for name in ("statistics", "plan")}
    noise = 2 * torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1))
    strength = {"prior": 0.5, "statistics": 2.0, "plan": 2.3}
    logits = {name: noise + k * F.one_hot(labels, 4) for name, k in strength.items()}
    losses = {name: tempered_losses(each, labels) for name, each in logits.items()}
    difference = losses["statistics"] - losses["plan"]
    assert difference.mean() > difference.std() / len(labels) ** 0.5
    shuffled = losses["statistics"] - losses["plan"].roll(1)
    assert shuffled.mean() < shuffled.std() / len(labels) ** 0.5

    def name_of(candidate: Plan | None) -> str:
        return next((name for name, each in plans.items() if each is candidate), "prior")

    verdict = judge(
        plans, labels, False, lambda p, rest, fold: logits[name_of(p)][fold], gain=0.0, gain_deviation=10.0,
        held_out=lambda p: logits[name_of(p)], label_free=["statistics"],
    )  # fmt: skip
    assert verdict.choice == "plan"


def test_gains_are_the_precision_weighted_mean_of_forecast_and_measurement() -> None:
    labels, plans = labels_of(), {"plan": plan()}
    predict = predictor({None: 0.3, "plan": 1.0}, labels, plans)
    verdict = judge(plans, labels, False, predict, gain=0.4, gain_deviation=0.2)
    splits = stratified_folds(labels, 2)
    held = torch.cat([fold for _, fold in splits])
    losses = [
        tempered_losses(torch.cat([predict(p, *split) for split in splits]), labels[held])
        for p in (None, plans["plan"])
    ]
    difference = losses[0] - losses[1]
    measured, error2 = float(difference.mean()), float(difference.var()) / len(held)
    expected = (0.4 / 0.04 + measured / error2) / (1 / 0.04 + 1 / error2)
    assert verdict.gains["plan"] == pytest.approx(expected)
    assert verdict.errors["plan"] == pytest.approx((1 / 0.04 + 1 / error2) ** -0.5)
    assert verdict.evidence == len(labels)


# ---------------------------------------------------------------------- its parts


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), folds=st.integers(2, 4), anchored=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_folds_are_stratified(counts: list[int], folds: int, anchored: bool, seed: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    splits = stratified_folds(labels, folds, anchored)
    if min(counts) < 2 and not anchored:
        assert splits == []
    if not splits:
        assert min(counts) < 2
        return
    held = torch.cat([fold for _, fold in splits])
    assert held.sort().values.tolist() == list(range(len(labels)))  # every image once
    for rest, fold in splits:
        assert sorted([*rest.tolist(), *fold.tolist()]) == list(range(len(labels)))
        for label, count in enumerate(counts):
            inside = int((labels[fold] == label).sum())
            assert count // len(splits) <= inside <= math.ceil(count / len(splits))
            if count >= 2:
                assert inside < count  # no class of several images is left out whole


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.2, 5.0), seed=st.integers(0, 99))
def test_tempered_losses_do_not_depend_on_the_sharpness_of_the_logits(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(10)
    logits = torch.randn(30, 3, generator=generator) + F.one_hot(labels, 3)
    found = tempered_losses(logits, labels)
    # No worse than any temperature of the grid, and the grid is fine enough not to notice a factor.
    plain = F.cross_entropy(logits.double(), labels)
    assert float(found.mean()) <= float(plain) + 1e-12
    assert found.shape == (30,)
    assert float(tempered_losses(scale * logits, labels).mean()) == pytest.approx(float(found.mean()), abs=0.02)


def test_candidates_are_cheapest_first() -> None:
    found = candidates(plan(), ["blend"])
    assert list(found) == ["statistics", "plan/3", "plan"]
    assert list(found["statistics"].gate_of()) == ["blend"]
    torch.testing.assert_close(found["plan/3"].rates, plan().rates / 3)
    assert list(candidates(plan((0.5, 0.0)), ["blend"])) == ["plan"]  # nothing learns: only the statistics
    assert list(candidates(plan((0.0, 0.5)), ["blend"])) == ["plan/3", "plan"]
    assert candidates(plan((0.0, 0.0)), ["blend"]) == {}
