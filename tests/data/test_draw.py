import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modmeta.data import DomainDataModule, Episode
from modmeta.data.digits import DigitsDomains
from modmeta.data.draw import EvaluationEpisodes, TrainingEpisodes
from modmeta.data.splits import Side


def same(one: Episode, other: Episode) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def training(store: DigitsDomains, **changes: Any) -> TrainingEpisodes:
    pool = Side("train", store.domains, store.classes).pool(store)
    arguments = {
        "ways": None,
        "queries": 5,
        "shifts": ("fog",),
        "shift_share": 0.5,
        "seed": 0,
        "shots": (1, 10),
    }
    return TrainingEpisodes(store=store, pool=pool, **{**arguments, **changes})


def evaluation(store: DigitsDomains, **changes: Any) -> EvaluationEpisodes:
    pool = Side("test", store.domains[:2], store.classes).pool(store)
    arguments = {
        "ways": (2, 5), "queries": 4, "shifts": (), "shift_share": 1.0, "seed": 0,
        "split": "test", "shots": (1, 3, 6), "episodes": 4,
    }  # fmt: skip
    return EvaluationEpisodes(store=store, pool=pool, **{**arguments, **changes})


def test_an_episode_depends_on_its_number_alone(digits: DigitsDomains) -> None:
    draw = training(digits, ways=(2, 7))
    forward = [draw[index] for index in range(12)]
    np.random.seed(5)
    torch.manual_seed(5)
    backward = [draw[index] for index in reversed(range(12))]
    assert all(same(one, other) for one, other in zip(forward, reversed(backward), strict=True))
    assert same(pickle.loads(pickle.dumps(draw))[3], forward[3])
    assert not same(training(digits, ways=(2, 7), seed=1)[3], forward[3])


@settings(max_examples=40, deadline=None)
@given(
    low=st.integers(2, 10), more=st.integers(0, 8), shots=st.integers(1, 12), queries=st.integers(1, 10),
    seed=st.integers(0, 2**31), index=st.integers(0, 2**31),
)  # fmt: skip
def test_every_episode_is_well_formed(
    digits: DigitsDomains, low: int, more: int, shots: int, queries: int, seed: int, index: int
) -> None:
    high = min(low + more, 10)
    draw = training(digits, ways=(low, high), shots=(1, shots), queries=queries, seed=seed)
    episode = draw[index]
    ways = len(episode.classes)
    assert low <= ways <= high
    assert 1 <= episode.shots <= shots
    assert episode.support.shape == (ways * episode.shots, 3, 32, 32)
    assert episode.query.shape == (ways * queries, 3, 32, 32)
    assert episode.support.dtype == torch.uint8
    assert episode.support_labels.bincount().tolist() == [episode.shots] * ways
    assert episode.query_labels.bincount().tolist() == [queries] * ways
    ids = torch.cat([episode.support_ids, episode.query_ids])
    assert len(ids.unique()) == len(ids), "support and query overlap"
    labels = torch.cat([episode.support_labels, episode.query_labels])
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert digits.classes[digits.row_classes[row]] == episode.classes[label]
        assert digits.domains[digits.row_domains[row]] == episode.domain


def test_ids_name_the_images_when_nothing_is_simulated(digits: DigitsDomains) -> None:
    episode = training(digits, shift_share=0.0)[4]
    assert episode.shift is None
    assert episode.strength == 0
    assert torch.equal(episode.support, digits.load(episode.support_ids))
    assert torch.equal(episode.query, digits.load(episode.query_ids))


def test_share_of_simulated_shifts_and_their_strength(digits: DigitsDomains) -> None:
    draw = training(digits, ways=(2, 2), shots=(1, 1), queries=1, shift_share=0.3, shifts=("invert", "gamma"))
    episodes = [draw[index] for index in range(400)]
    shifted = [episode for episode in episodes if episode.shift]
    assert 80 < len(shifted) < 160
    assert {episode.shift for episode in shifted} == {"invert", "gamma"}
    assert all(0.2 <= episode.strength <= 1 for episode in shifted)
    assert not torch.equal(shifted[0].support, digits.load(shifted[0].support_ids))


def test_shots_are_log_uniform(digits: DigitsDomains) -> None:
    draw = training(digits, ways=(2, 2), queries=1, shift_share=0.0)
    counts = np.bincount([draw[index].shots for index in range(600)], minlength=11)[1:]
    assert (counts > 0).all()
    assert counts[0] > 2 * counts[4] > counts[9]


def test_all_classes_come_in_the_order_of_the_store(digits: DigitsDomains) -> None:
    assert training(digits)[7].classes == digits.classes
    drawn = {training(digits, ways=(10, 10))[index].classes for index in range(5)}
    assert len(drawn) == 5


def test_more_shots_contain_fewer(digits: DigitsDomains) -> None:
    draw = evaluation(digits, shifts=("fog", "gaussian_noise", "impulse_noise", "random_conv"))
    for first in range(0, len(draw), 3):
        one, three, six = (draw[first + offset] for offset in range(3))
        assert (one.shots, three.shots, six.shots) == (1, 3, 6)
        assert one.classes == three.classes == six.classes
        assert one.shift == six.shift
        assert torch.equal(one.query_ids, six.query_ids)
        assert (one.query.int() - six.query.int()).abs().max() <= 1  # a matrix product may round otherwise
        assert set(one.support_ids.tolist()) < set(three.support_ids.tolist()) < set(six.support_ids.tolist())


def test_every_domain_and_shot_is_enumerated(digits: DigitsDomains) -> None:
    draw = evaluation(digits)
    assert len(draw) == 2 * 3 * 4
    cells = [(episode.domain, episode.shots) for episode in (draw[index] for index in range(len(draw)))]
    assert len(set(cells)) == 6
    assert all(cells.count(cell) == 4 for cell in cells)
    assert set(cells[:6]) == set(cells)
    with pytest.raises(IndexError):
        draw[24]


def test_a_domain_has_the_same_test_whatever_else_is_tested() -> None:
    def neon(test_domains: list[str]) -> Episode:
        module = DomainDataModule(test_domains=test_domains, eval_shots=[1])
        module.setup("test")
        return module.episode("test", module.test_domains.index("neon"))

    alone, together = neon(["neon"]), neon(["ink", "neon"])
    assert torch.equal(alone.support, together.support)
    assert torch.equal(alone.query, together.query)


def test_moving_keeps_the_rest(digits: DigitsDomains) -> None:
    moved = training(digits)[1].to("meta")
    assert moved.support.device.type == moved.query_ids.device.type == "meta"
    assert moved.classes == digits.classes
