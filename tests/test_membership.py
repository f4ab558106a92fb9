"""The attacks of the membership benchmark on confidences that are made up, where the answer is known."""

import numpy as np
import pytest
import torch
from membership import Trials, auc_and_tpr, log_odds, shadow_scores
from sklearn.metrics import roc_auc_score

MEMBER = np.random.default_rng(0).random((40, 50)) < 0.5


def trials(leak: float) -> Trials:
    """Return confidences of images of very different difficulty, which members raise by ``leak``."""
    random = np.random.default_rng(1)
    confidence = 5 * random.standard_normal(50) + random.standard_normal(MEMBER.shape) + leak * MEMBER
    return Trials(MEMBER, confidence, np.zeros(40))


def test_the_area_is_that_of_scikit_learn() -> None:
    scores = trials(1.0).confidence.round(1)  # with ties
    assert auc_and_tpr(scores, MEMBER)[0] == pytest.approx(roc_auc_score(MEMBER.flatten(), scores.flatten()))


def test_the_false_alarms_are_one_in_a_hundred() -> None:
    scores = np.arange(400.0)
    member = np.arange(400) % 2 == 0
    assert auc_and_tpr(scores, member)[1] == pytest.approx(0.01, abs=0.006)
    assert auc_and_tpr(np.where(member, scores + 1000, scores), member) == (1.0, 1.0)


def test_shadows_see_through_the_difficulty_of_an_image() -> None:
    found = trials(2.0)
    # Two unit normals that are 2 apart overlap by an AUC of 0.92; estimated means cost a little.
    assert auc_and_tpr(shadow_scores(found), MEMBER)[0] == pytest.approx(0.92, abs=0.03)
    assert auc_and_tpr(found.confidence, MEMBER)[0] < 0.7


def test_where_nothing_leaks_shadows_find_nothing() -> None:
    assert auc_and_tpr(shadow_scores(trials(0.0)), MEMBER)[0] == pytest.approx(0.5, abs=0.05)


def test_an_image_that_no_shadow_had_is_scored_like_the_others() -> None:
    found = trials(2.0)
    found.member[:, 0] = False
    found.member[3, 0] = True
    assert np.isfinite(shadow_scores(found)).all()


def test_log_odds_are_those_of_the_own_class() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 40.0, 0.0]])
    p = logits.double().softmax(1)
    found = log_odds(logits, torch.tensor([1, 1]))
    assert float(found[0]) == pytest.approx(float((p[0, 1] / (1 - p[0, 1])).log()))
    assert float(found[1]) == pytest.approx(40 - np.log(2))
