"""Trust in a support's labels, against all of their combinations and against the binomial distribution."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modmeta.adaptation import LabelTrust, Plan, label_trust


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
    assert found.trust == pytest.approx(expected, abs=1e-9)
    assert found.expected == pytest.approx(sum(doubts) / len(doubts))
    assert found.reckoned == reckoned
    assert 0 <= found.learning <= 1
    if found.trust >= 1 - reckoned:
        assert found.believed.all()
        assert found.learning == (found.trust if found.trust >= 0.5 else 0.0)
    else:
        assert found.believed.tolist() == [d <= reckoned + 1e-6 for d in doubts]


def test_many_equal_doubts_are_binomial() -> None:
    count, doubt = 350, 0.08
    at_most = sum(math.comb(count, k) * doubt**k * (1 - doubt) ** (count - k) for k in range(36))
    assert label_trust(torch.full((count,), doubt), 0.1).trust == pytest.approx(at_most, rel=1e-6)


def test_a_tenth_of_thirty_labels_are_three() -> None:
    three = torch.tensor([1.0] * 3 + [0.0] * 27)
    assert label_trust(three, 0.1).trust == 1.0
    assert label_trust(torch.tensor([1.0] * 4 + [0.0] * 26), 0.1).trust == 0.0


def test_all_are_learned_from_while_their_labels_are_trusted_together_as_one_is_beforehand() -> None:
    found = label_trust(torch.tensor([0.095, 0.0, 0.0]), 0.1)
    assert found.believed.all()
    assert found.learning == found.trust == pytest.approx(0.905)


def test_doubted_labels_are_left_out_and_the_others_judged_by_themselves() -> None:
    found = label_trust(torch.tensor([0.6, 0.1, 0.02, 0.3, 0.02]), 0.1)
    assert found.believed.tolist() == [False, True, True, False, True]
    assert found.trust == pytest.approx(0.4 * 0.9 * 0.98 * 0.7 * 0.98)
    assert found.learning == pytest.approx(0.9 * 0.98 * 0.98)


def test_labels_that_are_rather_not_to_be_trusted_teach_nothing() -> None:
    assert label_trust(torch.full((5,), 0.9), 0.1).learning == 0.0  # none is left
    assert label_trust(torch.full((8,), 0.09), 0.1).learning == 0.0  # all are, and one of them is rather wrong
    assert label_trust(torch.full((7,), 0.09), 0.1).learning == pytest.approx(0.91**7)


@pytest.mark.parametrize(("planned", "held_back"), [(0.4, 4.0), (1.0, 4.0), (1.5, 6.0)])
def test_a_head_that_is_held_back_has_four_times_the_ridge_and_nothing_else_changes(
    planned: float, held_back: float
) -> None:
    plan = Plan(
        ("film",), *(torch.rand(size) for size in [(1,), (1, 3), (1,), (1, 1)]), torch.tensor(planned),
        torch.tensor(0.2), torch.tensor(-3.0),
    )  # fmt: skip
    found = LabelTrust.temper(plan)
    assert float(found.ridge) == pytest.approx(held_back)
    assert found.to_dict() | {"ridge": 0.0} == plan.to_dict() | {"ridge": 0.0}


def test_the_head_is_held_back_where_labels_are_doubted_or_a_class_has_no_image_to_believe_in() -> None:
    labels = torch.tensor([0, 1, 1])
    trusted, doubted = (label_trust(torch.tensor([first, 0.0, 0.0]), 0.1) for first in (0.095, 0.11))
    assert (trusted.doubted, doubted.doubted) == (False, True)
    assert not trusted.holds_back(labels, 2)
    assert trusted.holds_back(labels, 3)
    assert doubted.holds_back(labels, 2)
    unbelieved = replace(trusted, believed=torch.tensor([False, True, True]))
    assert unbelieved.holds_back(labels, 2)
    assert not replace(trusted, believed=torch.tensor([True, False, True])).holds_back(labels, 2)
