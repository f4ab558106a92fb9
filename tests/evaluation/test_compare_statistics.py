"""The bootstrap against direct resampling, known cases, and the coverage that its intervals promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassCalibrationError

from modmeta.evaluation.compare.statistics import (
    calibration_error,
    episode_weights,
    interval,
    share_of_gap,
)
from modmeta.learners.metrics import calibration_bins


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 99))
def test_each_resample_holds_as_many_episodes_as_the_sample(count: int, seed: int) -> None:
    weights = episode_weights(count, np.random.default_rng(seed), 50)
    assert weights.shape == (51, count)
    assert np.array_equal(weights[0], np.full(count, 1 / count))
    held = weights * count
    assert np.allclose(held, held.round())
    assert np.allclose(weights.sum(1), 1)


def test_episodes_are_equally_likely() -> None:
    weights = episode_weights(7, np.random.default_rng(0), 20_000)[1:] * 7
    assert np.allclose(weights.mean(0), 1, atol=0.03)
    # Binomial: 7 draws with probability 1/7.
    assert np.allclose(weights.var(0), 6 / 7, atol=0.05)


def test_resamples_are_those_of_plain_loops() -> None:
    values = np.array([0.1, 0.5, 0.4, 0.9, 0.2])
    picks = np.random.default_rng(3).integers(5, size=(200, 5))
    expected = [values[row].mean() for row in picks]
    assert episode_weights(5, np.random.default_rng(3), 200)[1:] @ values == pytest.approx(expected)


def test_an_interval_is_the_middle_of_the_resamples() -> None:
    figure = np.concatenate([[0.4], np.arange(1001) / 1000])
    assert interval(figure) == pytest.approx((0.4, 0.025, 0.975))
    assert interval(np.array([2.0, 1.0, 1.0])) == (2.0, 1.0, 2.0)


@pytest.mark.parametrize(("count", "least"), [(30, 0.90), (200, 0.92)])
def test_intervals_cover_the_truth_as_often_as_they_promise(count: int, least: float) -> None:
    random = np.random.default_rng(0)
    truth, covered, trials = 0.7, 0, 400
    for _ in range(trials):
        # Accuracies of episodes: a binomial with a rate that itself differs from episode to episode.
        rates = random.beta(7, 3, size=count)
        accuracy = random.binomial(35, rates) / 35
        _, low, high = interval(episode_weights(count, random, 500) @ accuracy)
        covered += low <= truth <= high
    assert least <= covered / trials <= 0.98


def test_shared_resamples_make_differences_paired() -> None:
    random = np.random.default_rng(0)
    weights = episode_weights(50, random)
    hard = random.random(50)
    one, other = weights @ hard, weights @ (hard + 0.1)
    assert interval(other - one) == pytest.approx((0.1, 0.1, 0.1))
    assert interval(one)[2] - interval(one)[1] > 0.1


def test_the_calibration_error_of_the_sample_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    episodes = [torch.randn(20, 4, generator=generator).softmax(1).double() for _ in range(6)]
    labels = [torch.randint(4, (20,), generator=generator) for _ in range(6)]
    bins = np.array([calibration_bins(p, y).tolist() for p, y in zip(episodes, labels, strict=True)])
    weights = episode_weights(6, np.random.default_rng(0), 30)
    found = calibration_error(weights, bins)
    metric = MulticlassCalibrationError(4, n_bins=15, norm="l1")
    assert found[0] == pytest.approx(float(metric(torch.cat(episodes), torch.cat(labels))), abs=1e-5)
    for resample in (1, 17):
        picks = [e for e, times in enumerate((weights[resample] * 6).round().astype(int)) for _ in range(times)]
        metric.reset()
        expected = metric(torch.cat([episodes[e] for e in picks]), torch.cat([labels[e] for e in picks]))
        assert found[resample] == pytest.approx(float(expected), abs=1e-5)


def test_the_share_of_a_gap_is_told_only_where_there_is_one() -> None:
    low, high = np.array([0.5, 0.4]), np.array([0.7, 0.8])
    share = share_of_gap(np.array([0.6, 0.5]), low, high)
    assert share is not None
    assert share.tolist() == pytest.approx([0.5, 0.25])
    # A loss falls towards its oracle.
    loss = share_of_gap(np.array([0.6, 0.5]), high, low)
    assert loss is not None
    assert loss.tolist() == pytest.approx([0.5, 0.75])
    assert share_of_gap(low, low, np.array([0.7, 0.4])) is None
    assert share_of_gap(low, low, np.array([0.7, 0.3])) is None
