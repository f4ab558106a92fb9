"""Placements: all ways to fill the places of a backbone with candidate units."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from modmeta.adapters import Unit
from modmeta.errors import ModmetaError

Genome = tuple[int, ...]
"""A path in numbers: one choice for each place; 0 leaves the place empty."""


@dataclass(frozen=True)
class Placements:
    """The places that candidate units compete for, and what may stand there.

    Units compete for a place where the group behind the ``@`` of their names is the same one: ``film@s1`` and
    ``lora@s1`` are both for stage 1.

    Attributes:
        places: names of the groups, from the images to the features.
        choices: for each place the sets of units that may be open there together; the first one is empty.
    """

    places: tuple[str, ...]
    choices: tuple[tuple[tuple[str, ...], ...], ...]

    @classmethod
    def of(cls, units: Sequence[Unit], at_once: int = 1) -> Placements:
        """Return the placements of some units.

        Args:
            units: the candidates.
            at_once: how many of them may share a place.

        Raises:
            ModmetaError: if it is less than one.
        """
        if at_once < 1:
            raise ModmetaError(f"at_once must be 1 or more, got {at_once}")
        candidates: dict[str, list[str]] = {}
        for unit in sorted(units, key=lambda unit: unit.depth):
            place = unit.name.partition("@")[2].partition("#")[0]
            candidates.setdefault(place, []).append(unit.name)
        sets = [
            tuple(each for size in range(min(at_once, len(names)) + 1) for each in combinations(names, size))
            for names in candidates.values()
        ]
        return cls(tuple(candidates), tuple(sets))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices at each place."""
        return tuple(map(len, self.choices))

    def within(self, names: Container[str]) -> Placements:
        """Return the placements that use no other units than those in ``names``."""
        kept = tuple(tuple(each for each in sets if all(n in names for n in each)) for sets in self.choices)
        return Placements(self.places, kept)

    def open(self, genome: Genome) -> tuple[str, ...]:
        """Return the names of the units that a genome opens."""
        return tuple(name for sets, choice in zip(self.choices, genome, strict=True) for name in sets[choice])

    def draw(self, random: np.random.Generator) -> Genome:
        """Return a genome of which every place is filled uniformly at random."""
        return tuple(int(random.integers(size)) for size in self.sizes)
