"""Trust in a support's labels, against all of their combinations and against the binomial distribution."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modmeta.adaptation import label_trust, learning_share


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_trust_is_the_probability_of_no_more_wrong_labels_than_reckoned_with(
    doubts: list[float], reckoned: float
) -> None:
    doubt = torch.tensor(doubts, dtype=torch.double)
    found = label_trust(doubt, reckoned)
    expected = 0.0
    for wrong in itertools.product((False, True), repeat=len(doubts)):
        if sum(wrong) <= reckoned * len(doubts) + 1e-9:
            expected += math.prod(d if w else 1 - d for d, w in zip(doubts, wrong, strict=True))
    assert found["trust"] == pytest.approx(expected, abs=1e-9)
    assert found["expected"] == pytest.approx(sum(doubts) / len(doubts))
    assert found["reckoned"] == reckoned


def test_many_equal_doubts_are_binomial() -> None:
    count, doubt = 350, 0.08
    at_most = sum(math.comb(count, k) * doubt**k * (1 - doubt) ** (count - k) for k in range(36))
    assert label_trust(torch.full((count,), doubt), 0.1)["trust"] == pytest.approx(at_most, rel=1e-6)


def test_a_tenth_of_thirty_labels_are_three() -> None:
    three = torch.tensor([1.0] * 3 + [0.0] * 27)
    assert label_trust(three, 0.1)["trust"] == 1.0
    assert label_trust(torch.tensor([1.0] * 4 + [0.0] * 26), 0.1)["trust"] == 0.0


@pytest.mark.parametrize(("trust", "share"), [(1.0, 1.0), (0.8, 0.8), (0.5, 0.5), (0.49, 0.0), (0.0, 0.0)])
def test_labels_that_are_rather_not_to_be_trusted_teach_nothing(trust: float, share: float) -> None:
    assert learning_share({"expected": 0.1, "reckoned": 0.1, "trust": trust}) == share
    assert learning_share({}) == 1.0
