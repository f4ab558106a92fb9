"""Figures against torchmetrics and plain arithmetic, whatever the order in which episodes come."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from modmeta.learners import EpisodeMetrics, Result
from modmeta.learners.metrics import calibration_bins, expected_calibration_error, harmed, share_interval

FACTS = {"adapted": ("seconds",)}
Episode = tuple[int, str, int, Tensor, dict[str, Tensor], float]


def episodes_of(count: int, ways: int = 4, seed: int = 0) -> list[Episode]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        labels = torch.arange(ways).repeat_interleave(3)
        logits = {
            name: 2 * torch.randn(len(labels), ways, generator=generator) + good * F.one_hot(labels, ways)
            for name, good in (("none", 1.0), ("adapted", 2.5))
        }
        found.append((index, ("art", "photo")[index % 2], (1, 5)[index // 2 % 2], labels, logits, 0.1 * index))
    return found


def compute(episodes: list[Episode]) -> dict[tuple[str, str, int, str], Result]:
    metrics = EpisodeMetrics(("none", "adapted"), ("art", "photo", "empty"), (1, 5), FACTS)
    for index, domain, shots, labels, logits, seconds in episodes:
        metrics.update(domain, shots, index, labels, logits, {"adapted": {"seconds": seconds}})
    return {(r.system, r.domain, r.shots, r.metric): r for r in metrics.compute()}


@pytest.mark.fault(37)
@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), ways=st.integers(2, 12), sharpness=st.floats(0.1, 20.0), seed=st.integers(0, 99))
def test_calibration_error_is_that_of_torchmetrics(count: int, ways: int, sharpness: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32, in which torchmetrics bins: a confidence that only rounds to 1 there would differ, too.
    p = (sharpness * torch.randn(count, ways, generator=generator)).softmax(1).double()
    # torchmetrics gives a confidence of exactly 1 a sixteenth bin of its own; Guo et al. have none.
    assume(float(p.max()) < 1.0)
    labels = torch.randint(ways, (count,), generator=generator)
    expected = MulticlassCalibrationError(ways, n_bins=15, norm="l1")(p, labels)
    found = expected_calibration_error(calibration_bins(p, labels))
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_calibration_error_pools_the_predictions_of_all_episodes() -> None:
    episodes = episodes_of(12)
    found = compute(episodes)
    for domain, shots in (("art", 1), ("photo", 5)):
        mine = [e for e in episodes if (e[1], e[2]) == (domain, shots)]
        p = torch.cat([e[4]["adapted"].softmax(1) for e in mine])
        expected = MulticlassCalibrationError(4, n_bins=15, norm="l1")(p, torch.cat([e[3] for e in mine]))
        result = found["adapted", domain, shots, "ece"]
        assert result.value == pytest.approx(float(expected), abs=1e-5)
        assert 0 <= result.low <= result.value <= result.high <= 1
        assert result.low < result.high


def test_values_and_intervals_are_over_episodes() -> None:
    episodes = episodes_of(16)
    found = compute(episodes)
    mine = [e for e in episodes if (e[1], e[2]) == ("photo", 5)]

    def check(metric: str, system: str, values: list[float]) -> None:
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        half = 1.96 * deviation / math.sqrt(len(values))
        result = found[system, "photo", 5, metric]
        assert (result.value, result.low, result.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
        assert (result.episodes, result.ways) == (4, 4)

    def accuracy(e: Episode, system: str) -> float:
        return float((e[4][system].argmax(1) == e[3]).double().mean())

    for system in ("none", "adapted"):
        check("accuracy", system, [accuracy(e, system) for e in mine])
        check("nll", system, [float(F.cross_entropy(e[4][system].double(), e[3])) for e in mine])
    # Paired: the interval is that of the differences on the same episodes.
    check("gain", "adapted", [accuracy(e, "adapted") - accuracy(e, "none") for e in mine])
    harmed_here = sum(accuracy(e, "adapted") - accuracy(e, "none") < -0.0101 for e in mine)
    harm = found["adapted", "photo", 5, "harm_rate"]
    expected = binomtest(harmed_here, len(mine)).proportion_ci(method="wilson")
    assert (harm.value, harm.low, harm.high) == pytest.approx(
        (harmed_here / len(mine), expected.low, expected.high), abs=1e-4
    )
    check("seconds", "adapted", [e[5] for e in mine])


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_of_a_share_is_wilsons(drawn: tuple[int, int]) -> None:
    some, count = drawn
    share, low, high = share_interval(some / count, count)
    expected = binomtest(some, count).proportion_ci(method="wilson")
    assert share == some / count
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert 0 <= low <= share <= high <= 1
    assert low < high  # to have seen none does not mean that there are none


def test_harm_is_more_than_a_point_for_arrays_and_tensors_alike() -> None:
    reference = np.array([0.80, 0.80, 0.80, 0.80, 0.50])
    accuracy = np.array([0.80, 0.79, 0.78, 0.90, 0.48])
    assert harmed(accuracy, reference).tolist() == [False, False, True, False, True]
    single = [torch.from_numpy(each).float() for each in (accuracy, reference)]
    assert harmed(*single).tolist() == [False, False, True, False, True]


def test_a_point_less_is_no_harm_and_a_hair_more_is() -> None:
    labels = torch.zeros(200, dtype=torch.long)

    def right(hits: int) -> Tensor:
        return F.one_hot((torch.arange(200) >= hits).long(), 2).float()

    for lost, rate in ((0, 0.0), (2, 0.0), (3, 1.0), (-5, 0.0)):
        metrics = EpisodeMetrics(["none", "adapted"], ["art"], [1], {})
        metrics.update("art", 1, 0, labels, {"none": right(150), "adapted": right(150 - lost)}, {})
        found = {(r.system, r.metric): r.value for r in metrics.compute()}
        assert found["adapted", "harm_rate"] == rate
        assert ("none", "harm_rate") not in found


@pytest.mark.fault(37)
def test_only_what_was_measured_is_reported() -> None:
    found = compute(episodes_of(8))
    assert {(domain, shots) for _, domain, shots, _ in found} == {("art", 1), ("art", 5), ("photo", 1), ("photo", 5)}
    assert {metric for system, _, _, metric in found if system == "none"} == {"accuracy", "nll", "ece"}
    assert {m for s, _, _, m in found if s == "adapted"} == {"accuracy", "nll", "ece", "gain", "harm_rate", "seconds"}
    assert compute([]) == {}
    single = compute(episodes_of(1))["none", "art", 1, "accuracy"]
    assert single.low == single.value == single.high


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(10)))
def test_the_order_of_episodes_does_not_matter(order: list[int]) -> None:
    episodes = episodes_of(10)
    assert compute([episodes[k] for k in order]) == compute(episodes)
