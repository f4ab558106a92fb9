"""Doubts about labels against classifiers that are really fitted anew without each image."""

import numpy as np
import pytest

from modmeta.data.audit.suspicion import doubts, leave_one_out


def refitted(features: np.ndarray, labels: np.ndarray, ways: int) -> np.ndarray:
    """Fit by weighted ridge regression as often as there are images; centre, weights and ridge are those of all."""
    counts = np.bincount(labels)
    weight = len(labels) / (ways * counts[labels])
    center = np.mean([features[labels == label].mean(axis=0) for label in range(ways)], axis=0)
    x = features - center
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    targets = (labels[:, None] == np.arange(ways)) - 1 / ways
    ridge = (weight[:, None] * x**2).sum() / x.shape[1]
    scores = np.empty((len(x), ways))
    for row in range(len(x)):
        rest = np.arange(len(x)) != row
        a, b, w = x[rest], targets[rest], weight[rest, None]
        scores[row] = x[row] @ np.linalg.solve(a.T @ (w * a) + ridge * np.eye(x.shape[1]), a.T @ (w * b))
    return scores


@pytest.mark.parametrize(("images", "length"), [(40, 6), (12, 30)])
def test_leave_one_out_is_exact(images: int, length: int) -> None:
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1, 2], [images - 6, 4, 2]))
    features = random.normal(size=(images, length)) + labels[:, None]
    assert np.allclose(leave_one_out(features, labels, 3), refitted(features, labels, 3), atol=1e-9)


@pytest.mark.fault(16)
def test_flipped_labels_come_first() -> None:
    random = np.random.default_rng(1)
    centers = random.normal(size=(4, 16))
    true = np.repeat(np.arange(4), 25)
    features = centers[true] + 0.3 * random.normal(size=(100, 16))
    given = true.copy()
    wrong = random.choice(100, 5, replace=False)
    given[wrong] = (given[wrong] + 1) % 4
    found = doubts(features, ["a"] * 100, [f"class {label}" for label in given])
    margins = np.array([doubt.margin for doubt in found if doubt is not None])
    assert set(np.argsort(-margins)[:5].tolist()) == set(wrong.tolist())
    assert (margins > 0).sum() == 5
    for row in wrong:
        doubt = found[row]
        assert doubt is not None
        assert doubt.other == f"class {true[row]}"


def test_nothing_is_said_where_nothing_is_known() -> None:
    features = np.random.default_rng(0).normal(size=(9, 4))
    domains = ["a"] * 5 + ["b"] * 4
    labels = ["cat", "cat", "dog", "dog", "owl", "cat", "cat", "cat", "dog"]
    found = doubts(features, domains, labels)
    assert [doubt is not None for doubt in found] == [True] * 4 + [False] * 5
    assert doubts(features[:0], [], []) == []


def test_a_domain_is_judged_by_itself() -> None:
    random = np.random.default_rng(2)
    features = random.normal(size=(20, 5))
    labels = ["cat", "dog"] * 10
    alone = doubts(features[:10], ["a"] * 10, labels[:10])
    assert doubts(features, ["a"] * 10 + ["b"] * 10, labels)[:10] == alone


def test_equal_features_make_no_doubt_and_no_nan() -> None:
    found = doubts(np.ones((6, 3)), ["a"] * 6, ["cat", "dog"] * 3)
    assert [doubt.margin for doubt in found if doubt is not None] == [0.0] * 6
