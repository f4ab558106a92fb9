"""A track record trusts what has held on hidden domains, and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modmeta.adaptation import TrackRecord, Trial
from modmeta.adaptation.track_record import CANDIDATES, Expectation


def trials(
    slope: float = 0.0, mean: float = 0.1, noise: float = 0.02, domains: int = 4, each: int = 12, of: str = "evidence"
) -> list[Trial]:
    """Return trials whose gain is a line in the evidence or in the forecast."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for domain in range(domains):
        for number in range(each):
            evidence, forecast, error = torch.randn(3, generator=generator).tolist()
            gain = mean + slope * (evidence if of == "evidence" else forecast) + noise * error
            seen = dict.fromkeys(CANDIDATES, evidence)
            found.append(Trial(f"d{domain}", True, 1 + number % 5, forecast, seen, dict.fromkeys(CANDIDATES, gain)))
    return found


def expect(lead_error: float = 0.0, **gains: float) -> dict[str, Expectation]:
    """Return expectations by gains; ``third`` stands for ``plan/3``."""
    return {name.replace("third", "plan/3"): Expectation(gain, 0.0, lead_error) for name, gain in gains.items()}


def fitted(rows: list[Trial]) -> TrackRecord:
    record = TrackRecord()
    record.fit(rows)
    return record


@pytest.mark.parametrize("of", ["evidence", "forecast"])
def test_what_carries_over_is_used(of: str) -> None:
    record = fitted(trials(slope=0.5, of=of))
    high, low = ({"evidence": e, "forecast": f} for e, f in ([(1.0, 0.0), (-1.0, 0.0)] if of == "evidence" else
                                                            [(0.0, 1.0), (0.0, -1.0)]))  # fmt: skip
    assert record.predict("plan", shots=3, **high)[0] == pytest.approx(0.6, abs=0.08)
    assert record.predict("plan", shots=3, **low)[0] == pytest.approx(-0.4, abs=0.08)
    assert record.predict("plan", 0.0, 0.0, 3)[1] < 0.1


def test_what_holds_within_domains_alone_is_not_trusted() -> None:
    # The forecast rises where the gain of the other domains falls: a line through some fails on the next.
    rows = []
    for domain, slope in enumerate((1.0, -1.0, 1.0, -1.0)):
        for number in range(10):
            forecast = (number - 4.5) / 3
            rows.append(Trial(f"d{domain}", True, 5, forecast, {}, {"plan": 0.05 + slope * forecast}))
    record = fitted(rows)
    for forecast in (-2.0, 0.0, 2.0):
        assert record.predict("plan", forecast, None, 5)[0] == pytest.approx(0.05, abs=1e-6)


def test_missing_evidence_counts_as_what_is_always_seen() -> None:
    record = fitted(trials(slope=0.5))
    center = float(record.center[1])
    assert record.predict("plan", 0.0, None, 3) == record.predict("plan", 0.0, center, 3)


def test_harm_in_one_domain_raises_the_threshold() -> None:
    good = [Trial("a", True, 5, 0.0, {"plan": 0.2 + 0.01 * n}, {"plan": 0.3}) for n in range(10)]
    also = [Trial("b", True, 5, 0.0, {"plan": 0.2 + 0.01 * n}, {"plan": 0.3}) for n in range(10)]
    bad = [Trial("c", True, 5, 0.0, {"plan": -0.2 - 0.01 * n}, {"plan": -0.1}) for n in range(10)]
    record = fitted(good + also + bad)
    assert record.predict("plan", 0.0, 0.25, 5)[0] > float(record.threshold)
    assert record.predict("plan", 0.0, -0.25, 5)[0] <= float(record.threshold)
    hopeless = [
        Trial(d, True, 5, 0.0, {}, {"plan": g}) for d, g in (("a", 0.5), ("b", 0.5), ("c", -0.5)) for _ in range(5)
    ]
    record = fitted(hopeless)
    assert record.predict("plan", 0.0, None, 5)[0] <= float(record.threshold)


def test_an_untried_candidate_is_never_chosen_and_an_empty_record_is_not_ready() -> None:
    record = TrackRecord()
    assert not record.ready
    record.fit([])
    assert not record.ready
    record.fit([Trial("a", True, 1, 0.0, {}, {"plan": 0.2})])
    assert record.ready
    assert record.predict("statistics", 0.0, None, 1)[0] == -math.inf
    assert record.predict("plan", 0.0, None, 1)[0] == pytest.approx(0.2)


@pytest.mark.parametrize(("lead", "choice"), [(0.001, "plan"), (0.02, "plan"), (0.04, "plan/3"), (-0.04, "plan")])
def test_the_plan_stands_unless_another_is_surely_better(lead: float, choice: str) -> None:
    # Gains scatter by 0.3, but together: what one is ahead of the other scatters by 0.05 and is known to 0.011.
    common, own = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).tolist()
    apart = [0.05 * (each - sum(own) / 20) for each in own]
    rows = [
        Trial(f"d{number}", True, 5, 0.0, {}, {"plan": 0.3 * each, "plan/3": 0.3 * each + lead + mine})
        for number, (each, mine) in enumerate(zip(common, apart, strict=True))
    ]
    record = fitted(rows)
    assert record.lead_errors.tolist() == pytest.approx([0.0, 0.011, 0.0], abs=3e-3)
    expected = {name: record.predict(name, 0.0, None, 5) for name in CANDIDATES}
    assert expected["plan/3"].gain - expected["plan"].gain == pytest.approx(lead, abs=1e-6)
    record.threshold.fill_(-1.0)
    assert record.choose(expected) == choice
    record.threshold.fill_(0.5)
    assert record.choose(expected) is None


def test_a_lead_in_one_domain_alone_is_not_sure() -> None:
    # Over trials the lead is known to 0.003, but all of it lies in one domain of three.
    rows = [
        Trial(domain, True, 5, 0.0, {}, {"plan": 0.3, "plan/3": 0.3 + (0.03 if domain == "a" else 0.0)})
        for domain in "abc"
        for _ in range(8)
    ]
    record = fitted(rows)
    expected = {name: record.predict(name, 0.0, None, 5) for name in CANDIDATES}
    assert expected["plan/3"].gain - expected["plan"].gain == pytest.approx(0.01)
    assert record.choose(expected) == "plan"


@pytest.mark.parametrize("evidence", [0.0, 0.4, -0.8])
def test_a_lead_is_as_sure_as_a_line_through_the_trials_is_there(evidence: float) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.linspace(-0.5, 0.5, 40)
    rows = [
        Trial(f"d{n}", True, 5, 0.0, {"plan": e, "plan/3": e}, {"plan": e, "plan/3": 1.2 * e + 0.1 * noise})
        for n, (e, noise) in enumerate(zip(seen.tolist(), torch.randn(40, generator=generator).tolist(), strict=True))
    ]
    record = fitted(rows)
    design = torch.stack([torch.ones(40), seen], dim=1).double()
    at = torch.tensor([1.0, evidence]).double()
    textbook = (at @ torch.linalg.inv(design.T @ design) @ at).sqrt()
    at_mean = record.predict("plan/3", 0.0, 0.0, 5).lead_error
    assert at_mean > 0.0
    measured = record.predict("plan/3", 0.0, evidence, 5).lead_error / at_mean
    assert measured == pytest.approx(float(textbook) * 40**0.5, rel=1e-6)


def test_a_lead_that_is_sure_among_the_trials_is_not_far_from_them() -> None:
    # A lead of 0.03 at any forecast, known to 0.008 where the trials are.
    noise = (0.05 * torch.randn(18, generator=torch.Generator().manual_seed(0))).tolist()
    rows = [
        Trial(f"d{n}{sign}", True, 5, n % 6, {}, {"plan": 0.1, "plan/3": 0.13 + sign * each})
        for n, each in enumerate(noise)
        for sign in (-1, 1)
    ]
    record = fitted(rows)
    for forecast, choice in ((2.5, "plan/3"), (8.0, "plan")):
        expected = {name: record.predict(name, forecast, None, 5) for name in CANDIDATES}
        assert expected["plan/3"].gain - expected["plan"].gain == pytest.approx(0.03, abs=1e-3)
        assert record.choose(expected) == choice


def test_a_plan_that_is_not_accepted_gives_way_to_the_best_that_is() -> None:
    record = fitted(trials(noise=0.1))
    record.threshold.fill_(0.02)
    assert record.choose(expect(1.0, statistics=0.01, third=0.03, plan=0.01)) == "plan/3"
    assert record.choose(expect(1.0, statistics=0.04, third=0.03, plan=0.021)) == "plan"


def test_without_the_plan_the_best_is_chosen_and_of_nothing_nothing() -> None:
    record = fitted(trials())
    assert record.choose(expect(1.0, statistics=0.1, third=0.3)) == "plan/3"
    assert record.choose({}) is None
    assert record.choose(expect(plan=math.nan, statistics=-math.inf)) is None


def test_the_threshold_is_for_what_would_be_chosen() -> None:
    # The thirds are a hair better on average and would lose nothing; the plans that stand instead lose in one domain.
    gains = {"a": (0.5, 0.4), "b": (0.5, 0.4), "c": (-0.4, 0.0)}
    rows = [Trial(d, True, 5, 0.0, {}, {"plan": p, "plan/3": t}) for d, (p, t) in gains.items() for _ in range(4)]
    record = fitted(rows)
    assert record.choose(expect(0.1, plan=0.2, third=0.26)) is None
    assert fitted([Trial(t.domain, True, 5, 0.0, {}, {"plan/3": t.gains["plan/3"]}) for t in rows]).choose(
        expect(third=0.26)
    )


@pytest.mark.parametrize("kinds", [(True,), (False,), (True, False), ()])
def test_it_covers_what_it_has_trials_of(kinds: tuple[bool, ...]) -> None:
    record = fitted([Trial("a", kind, 5, 0.0, {}, {"plan": 0.2}) for kind in kinds])
    assert [record.covers(True), record.covers(False)] == [True in kinds, False in kinds]


def test_a_record_survives_its_state_dict() -> None:
    record, other = fitted(trials(slope=0.3)), TrackRecord()
    other.load_state_dict(record.state_dict())
    assert other.predict("plan/3", 0.2, 0.4, 2) == record.predict("plan/3", 0.2, 0.4, 2)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.builds(
            Trial,
            domain=st.sampled_from("abc"),
            anchored=st.booleans(),
            shots=st.floats(1, 50),
            forecast=st.floats(-5, 5),
            evidence=st.dictionaries(st.sampled_from(CANDIDATES), st.floats(-5, 5)),
            gains=st.dictionaries(st.sampled_from(CANDIDATES), st.floats(-5, 5), min_size=1),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_predictions_are_finite_whatever_was_tried(rows: list[Trial]) -> None:
    record = fitted(rows)
    assert math.isfinite(float(record.threshold))
    assert float(record.threshold) >= 0.0
    for name in CANDIDATES:
        expected = record.predict(name, 3.0, -2.0, 4)
        assert math.isfinite(expected.error)
        assert math.isfinite(expected.lead_error)
        assert math.isfinite(expected.gain) or not any(name in row.gains for row in rows)
