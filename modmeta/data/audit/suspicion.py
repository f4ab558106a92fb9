"""Labels that the other images of a domain speak against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Doubt:
    """How much better another label fits an image than its own.

    Attributes:
        margin: the other label's score minus that of its own; above 0 the other one fits better. A label's indicator
            is 1, so that 1 is a lot.
        other: the best other label.
    """

    margin: float
    other: str


def doubts(features: np.ndarray, domains: Sequence[str], labels: Sequence[str]) -> list[Doubt | None]:
    """Judge every label by a classifier that was fitted to the other images of its domain.

    Args:
        features: ``(n, D)``, of any kind.
        domains: for each image its domain.
        labels: for each image its label.

    Returns:
        For each image a doubt, or None where nothing can be said: it is the only one of its label, or its domain
        has no two labels with two images each.
    """
    found: list[Doubt | None] = [None] * len(labels)
    of, label_of = np.array(domains), np.array(labels)
    for domain in sorted(set(domains)):
        rows = np.flatnonzero(of == domain)
        names, counts = np.unique(label_of[rows], return_counts=True)
        names = names[counts > 1]
        rows = rows[np.isin(label_of[rows], names)]
        if len(names) < 2:
            continue
        own = np.searchsorted(names, label_of[rows])
        scores = leave_one_out(features[rows], own, len(names))
        of_own = scores[np.arange(len(rows)), own].copy()
        scores[np.arange(len(rows)), own] = -np.inf
        best = scores.argmax(axis=1)
        for row, other, margin in zip(rows, best, scores.max(axis=1) - of_own, strict=True):
            found[row] = Doubt(float(margin), str(names[other]))
    return found


def leave_one_out(features: np.ndarray, labels: np.ndarray, ways: int) -> np.ndarray:
    """Return for every image the scores of a ridge classifier that was fitted without it.

    Features are centred on the mean of the class means and scaled to unit length, every class weighs the same, and
    the ridge is the mean eigenvalue of the features. In closed form from one eigendecomposition of at most ``D x D``,
    so that the cost is linear in the number of images; the head ``ridge``, made for few images, is cubic in it.

    Args:
        features: ``(n, D)``.
        labels: ``(n,)`` in ``0..ways-1``, each of them at least twice.
        ways: number of labels.

    Returns:
        ``(n, ways)``, float64: estimates of the indicator of each label less ``1 / ways``.
    """
    weight = 1 / np.bincount(labels, minlength=ways)[labels] * len(labels) / ways
    x = features.astype(np.float64)
    x = x - weight @ x / len(x)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    targets = np.eye(ways)[labels] - 1 / ways
    root = np.sqrt(weight)[:, None]
    x, y = root * x, root * targets
    turned, variances = _principal(x)
    shrunk = turned / (variances + max(variances.sum() / x.shape[1], 1e-12))
    leverage = (turned * shrunk).sum(axis=1, keepdims=True)
    errors = (y - shrunk @ (turned.T @ y)) / (1 - leverage)
    return targets - errors / root


def _principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``x`` in the coordinates of its principal axes, and the sum of squares along each of them."""
    if len(x) > x.shape[1]:
        variances, axes = np.linalg.eigh(x.T @ x)
        return x @ axes, variances.clip(0)
    variances, directions = np.linalg.eigh(x @ x.T)
    return directions * np.sqrt(variances.clip(0)), variances.clip(0)
