from itertools import pairwise

import numpy as np
import pytest

from modmeta.errors import ModmetaError
from modmeta.learners.placements import Genome
from modmeta.search.evolution import Evolution, ranked

SIZES = (4,) * 12
TARGET = (1, 0, 3, 2, 2, 0, 1, 3, 0, 0, 2, 1)
"""The best genome of the synthetic objective."""


def objective(genome: Genome) -> float:
    """One point per place that is right, half a point more for two in a row, so that crossover has blocks to keep."""
    hits = [gene == best for gene, best in zip(genome, TARGET, strict=True)]
    return sum(hits) + 0.5 * sum(a and b for a, b in pairwise(hits))


def evolve(settings: Evolution, sizes: tuple[int, ...] = SIZES, scores: dict | None = None) -> dict[Genome, float]:
    scores = {} if scores is None else scores
    for number in range(settings.generations):
        scores |= {genome: objective(genome) for genome in settings.generation(number, sizes, scores)}
    return scores


@pytest.mark.parametrize("seed", range(5))
def test_it_beats_random_search_at_as_many_evaluations(seed: int) -> None:
    found = evolve(Evolution(population=16, generations=10, seed=seed))
    assert len(found) == 160
    random = np.random.default_rng(1000 + seed)
    draws = {tuple(int(gene) for gene in random.integers(4, size=12)) for _ in range(160)}
    assert max(found.values()) >= max(map(objective, draws)) + 2


def test_the_known_best_one_is_found() -> None:
    found = evolve(Evolution(population=16, generations=40, seed=0))
    assert ranked(found)[0] == TARGET


def test_a_generation_is_a_function_of_what_was_measured() -> None:
    settings = Evolution(population=4, generations=3, seed=3)
    whole = evolve(settings)
    first = list(whole)[:8]
    resumed = settings.generation(2, SIZES, {genome: objective(genome) for genome in first})
    assert resumed == list(whole)[8:]
    assert list(evolve(Evolution(population=4, generations=3, seed=4))) != list(whole)


def test_a_small_space_is_measured_to_the_end_without_repeats() -> None:
    settings = Evolution(population=5, generations=4, seed=0)
    scores: dict[Genome, float] = {}
    counts = []
    for number in range(4):
        new = settings.generation(number, (2, 2, 2), scores)
        assert not scores.keys() & set(new)
        counts.append(len(new))
        scores |= dict.fromkeys(new, 0.0)
    assert counts == [5, 2, 0, 0]
    assert (0, 0, 0) not in scores


def test_what_failed_has_no_children() -> None:
    good, failed = (1, 1, 1, 1), (2, 2, 2, 2)
    settings = Evolution(population=30, parents=2, mutation=0.0, seed=0)
    children = settings.generation(1, (3,) * 4, {failed: None, good: -1.0})
    near = [child for child in children if sum(a != b for a, b in zip(child, good, strict=True)) == 1]
    assert children[:8] == near[:8]  # a place has two other choices; then only chance has new ones


def test_equal_ones_are_ranked_by_age() -> None:
    assert ranked({(1,): 0.5, (2,): None, (3,): 0.7, (4,): 0.5}) == [(3,), (1,), (4,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": 0}, "population=0 is too small"),
        ({"parents": 0}, "parents=0 is too small"),
        ({"mutation": 1.5}, "mutation=1.5 must lie in 0..1"),
        ({"seed": -1}, "seed=-1 is too small"),
    ],
)
def test_settings_out_of_range(change: dict, message: str) -> None:
    with pytest.raises(ModmetaError, match=message):
        Evolution(**change)
