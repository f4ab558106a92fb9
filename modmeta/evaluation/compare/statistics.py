"""The bootstrap over episodes: every figure of the sample and of its resamples at once.

A figure is an array ``(1 + R,)``: its value on the episodes as they are, and on R resamples of them. Whatever is
computed from figures (differences, means over domains, ratios) is computed on all of these alike, so that figures
of one set of resamples stay paired: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
_ROUNDING = 1e-9


def episode_weights(count: int, random: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the weights of episodes in the sample and in its resamples.

    Args:
        count: number of episodes.
        random: draws the resamples.
        resamples: their number R.

    Returns:
        ``(1 + R, count)``; each row sums to one, and the first is uniform.
    """
    picks = random.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    drawn = np.bincount(picks.ravel(), minlength=resamples * count).reshape(resamples, count)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def interval(figure: np.ndarray) -> tuple[float, float, float]:
    """Return the value of a figure and its 95 % percentile interval."""
    value = float(figure[0])
    low, high = np.quantile(figure[1:], (0.025, 0.975))
    return value, min(float(low), value), max(float(high), value)


def calibration_error(weights: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Return the figure of the expected calibration error of pooled predictions: Guo et al., ICML 2017.

    Args:
        weights: ``(1 + R, n)`` of the episodes.
        bins: ``(n, 15, 3)``, per episode and confidence bin the count, the sum of confidences and the hits.
    """
    gaps = weights @ (bins[:, :, 1] - bins[:, :, 2])
    return np.abs(gaps).sum(1) / (weights @ bins[:, :, 0].sum(1))


def share_of_gap(figure: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """Return the share of the way from one figure to another that a third has gone.

    Returns:
        The figure, or None where the sample or a resample has no gap: then no share can be told.
    """
    gap = high - low
    if not (np.all(gap > _ROUNDING) or np.all(gap < -_ROUNDING)):
        return None
    return (figure - low) / gap + 0.0  # no negative zero
