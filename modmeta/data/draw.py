"""How an episode is drawn: a pure function of a seed and a number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from modmeta.data.augment import AUGMENTED, deform
from modmeta.data.episode import Episode
from modmeta.data.images import ImageStore
from modmeta.data.seeding import rng
from modmeta.data.shifts import apply_shift
from modmeta.data.splits import Pool

WEAKEST_SHIFT = 0.2  # weaker ones can hardly be told from none


@dataclass(frozen=True)
class EpisodeDraw(ABC):
    """A numbered collection of episodes; ``draw[i]`` is the same one whenever and wherever it is asked for.

    Attributes:
        store: the images.
        pool: the rows to draw from.
        ways: least and most classes per episode. None takes every class that the domain has, in the
            store's order; otherwise the classes and their order are random.
        queries: query images per class.
        shifts: the families that a simulated shift is drawn from.
        shift_share: the probability that an episode goes through a simulated shift.
        seed: fixes everything.
        augment: how far each image is deformed on its own, in 0..1.
    """

    store: ImageStore
    pool: Pool
    ways: tuple[int, int] | None
    queries: int
    shifts: tuple[str, ...]
    shift_share: float
    seed: int
    augment: float = field(default=0.0, kw_only=True)

    @abstractmethod
    def __getitem__(self, index: int) -> Episode:
        """Return episode ``index``."""

    @cached_property
    def _classes(self) -> dict[str, tuple[str, ...]]:
        return {domain: tuple(by_class) for domain, by_class in self.pool.items()}

    def _draw(self, index: int, random: np.random.Generator, domain: str, shots: int) -> Episode:
        by_class, classes = self.pool[domain], self._classes[domain]
        if self.ways is not None:
            ways = int(random.integers(self.ways[0], self.ways[1] + 1))
            classes = tuple(classes[i] for i in random.permutation(len(classes))[:ways].tolist())
        # Queries come first, here and below, so that the same draw with more shots has the same queries,
        # their simulated noise included, and keeps the support that it had.
        dealt = [random.permutation(by_class[name]) for name in classes]
        queries = [rows[: self.queries] for rows in dealt]
        support = [rows[self.queries : self.queries + shots] for rows in dealt]
        ids = np.concatenate(queries + support)
        images = self.store.load(torch.from_numpy(ids))
        count = len(classes) * self.queries
        shift, strength = None, 0.0
        if self.augment:
            shift, strength = AUGMENTED, self.augment
            images = deform(images, self.augment, random)
        if self.shifts and random.random() < self.shift_share:
            shift = self.shifts[random.integers(len(self.shifts))]
            strength = float(random.uniform(WEAKEST_SHIFT, 1))
            images = apply_shift(shift, images, strength, seed=int(random.integers(2**63)))
        labels = np.arange(len(classes))
        return Episode(
            index=index,
            domain=domain,
            classes=classes,
            shots=shots,
            support=images[count:],
            support_labels=torch.from_numpy(labels.repeat(shots)),
            support_ids=torch.from_numpy(ids[count:]),
            query=images[:count],
            query_labels=torch.from_numpy(labels.repeat(self.queries)),
            query_ids=torch.from_numpy(ids[:count]),
            shift=shift,
            strength=strength,
        )


@dataclass(frozen=True)
class TrainingEpisodes(EpisodeDraw):
    """An endless supply of random episodes.

    Attributes:
        shots: least and most support images per class; drawn log-uniformly, since one shot more
            matters the more, the fewer there are.
    """

    shots: tuple[int, int]

    def __getitem__(self, index: int) -> Episode:
        """Return episode ``index``, any number from 0."""
        random = rng(self.seed, "train", index)
        domain = list(self.pool)[random.integers(len(self.pool))]
        low, high = self.shots
        shots = int(math.exp(random.uniform(math.log(low), math.log(high + 1))))
        return self._draw(index, random, domain, min(max(shots, low), high))


@dataclass(frozen=True)
class EvaluationEpisodes(EpisodeDraw):
    """A fixed number of episodes for each domain and number of shots.

    Draw ``j`` of a domain depends on the seed, the split, the domain and ``j`` alone: at more shots it has
    the same classes, queries and shift, and a support that contains the smaller one.

    Attributes:
        split: ``"val"`` or ``"test"``.
        shots: the numbers of support images per class.
        episodes: draws per domain and number of shots.
    """

    split: str
    shots: Sequence[int]
    episodes: int

    def __len__(self) -> int:
        return self.episodes * len(self.pool) * len(self.shots)

    def __getitem__(self, index: int) -> Episode:
        """Return episode ``index``; the shots vary fastest, then the domains, then the draws."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split} episode {index} of {len(self)}")
        # So ordered, the first part of a test that is cut short is as balanced as the whole.
        rest, shot = divmod(index, len(self.shots))
        draw, place = divmod(rest, len(self.pool))
        domain = list(self.pool)[place]
        return self._draw(index, rng(self.seed, self.split, domain, draw), domain, self.shots[shot])
