"""Evolutionary search over paths: one choice per place, and a score that is to be as large as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.learners.placements import Genome

Scores = Mapping[Genome, float | None]
"""What was measured of each path; None where it cannot be used at all."""

_TRIES = 200


@dataclass(frozen=True)
class Evolution:
    """How paths are bred (Guo et al., "Single Path One-Shot Neural Architecture Search", ECCV 2020).

    The first generation is random. Every later one is half crossovers of two of the best paths so far and half
    mutations of one of them. No path is measured twice.

    Args:
        population: new paths in each generation.
        generations: how many there are.
        parents: so many of the best paths so far are bred from.
        mutation: probability that a place of a mutated path is filled anew; one place is in any case.
        seed: fixes every draw.
    """

    population: int = 16
    generations: int = 8
    parents: int = 8
    mutation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "generations", "parents"):
            if getattr(self, name) < 1:
                raise ModmetaError(f"{name}={getattr(self, name)} is too small; it must be 1 or more")
        if not 0 <= self.mutation <= 1:
            raise ModmetaError(f"mutation={self.mutation} must lie in 0..1")
        if self.seed < 0:
            raise ModmetaError(f"seed={self.seed} is too small; it must be 0 or more")

    def generation(self, number: int, sizes: Sequence[int], scores: Scores) -> list[Genome]:
        """Return the new paths of a generation: a function of these arguments alone, so a resumed search is the same.

        Args:
            number: from 0.
            sizes: number of choices at each place; choice 0 leaves it empty, and a genome of zeros is never proposed.
            scores: of all paths of the generations before.

        Returns:
            ``population`` paths, or as many as there are left.
        """
        random = rng(self.seed, "generation", number)
        parents = ranked(scores)[: self.parents]
        found: list[Genome] = []
        for child in range(self.population):
            breeds: list[Callable[[], Genome]] = [lambda: tuple(int(random.integers(size)) for size in sizes)]
            if parents:
                crosses = child % 2 == 0 and len(parents) > 1
                breed = (lambda: _cross(parents, random)) if crosses else (lambda: self._mutate(parents, sizes, random))
                breeds.insert(0, breed)  # chance comes in where parents have no new children
            proposals = (breed() for breed in breeds for _ in range(_TRIES))
            new = next((path for path in proposals if any(path) and path not in scores and path not in found), None)
            if new is not None:
                found.append(new)
        return found

    def _mutate(self, parents: Sequence[Genome], sizes: Sequence[int], random: np.random.Generator) -> Genome:
        parent = parents[int(random.integers(len(parents)))]
        changed = random.random(len(sizes)) < self.mutation
        changed[int(random.integers(len(sizes)))] = True
        # By another choice than the one that is there.
        steps = [int(random.integers(1, size)) if size > 1 else 0 for size in sizes]
        rows = zip(parent, sizes, steps, changed, strict=True)
        return tuple((gene + step) % size if change else gene for gene, size, step, change in rows)


def ranked(scores: Scores) -> list[Genome]:
    """Return the paths that can be used, the best one first; equal ones in the order in which they were measured."""
    usable = {path: score for path, score in scores.items() if score is not None}
    return sorted(usable, key=lambda path: -usable[path])


def _cross(parents: Sequence[Genome], random: np.random.Generator) -> Genome:
    first, second = random.choice(len(parents), 2, replace=False)
    pairs = zip(parents[first], parents[second], random.random(len(parents[0])) < 0.5, strict=True)
    return tuple(a if left else b for a, b, left in pairs)
