"""Streams depend on seed and purpose alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modmeta.data.seeding import rng

WORDS = st.lists(st.integers(0, 2**40), max_size=4)


@given(st.integers(0, 2**40), WORDS)
def test_numbers_of_any_size_seed_as_numpy_has_it(seed: int, words: list[int]) -> None:
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))
    assert rng(seed, *words).integers(2**62, size=3).tolist() == expected.integers(2**62, size=3).tolist()


def test_every_seed_and_purpose_has_a_stream_of_its_own() -> None:
    purposes = [(word, number) for word in ("train", "test") for number in (0, 1, 2, 2**31)]
    first = {int(rng(seed, *purpose).integers(2**62)) for seed in (0, 1, 2) for purpose in purposes}
    assert len(first) == 3 * len(purposes)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        rng(-1, "train")
