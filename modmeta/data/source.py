"""The training domains as ordinary labelled images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from modmeta.data.augment import deform
from modmeta.data.episode import SourceBatch
from modmeta.data.images import ImageStore
from modmeta.data.seeding import rng
from modmeta.data.splits import Pool

CHUNK = 256  # images that are handed out at once


@dataclass(frozen=True)
class SourceImages:
    """The images for supervised training and for source statistics.

    Attributes:
        store: the images.
        pool: the rows of each training domain and class, in a seeded order.
        classes: label ``i`` means ``classes[i]``.
        batch_size: images in a batch over all ranks.
        seed: fixes the batches.
        augment: how far each image of a batch is deformed on its own, in 0..1.
    """

    store: ImageStore
    pool: Pool
    classes: Sequence[str]
    batch_size: int
    seed: int
    augment: float = 0.0

    @cached_property
    def _cells(self) -> list[tuple[int, int, np.ndarray]]:
        """Domain, label and rows of every class in every domain."""
        return [
            (domain, self.classes.index(name), rows)
            for domain, by_class in enumerate(self.pool.values())
            for name, rows in by_class.items()
        ]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> SourceBatch:
        """Return a rank's part of the batch of a step; all domains and classes are equally likely."""
        random = rng(self.seed, "source", step)
        chosen = random.integers(len(self._cells), size=self.batch_size)[rank::world]
        places = random.random(self.batch_size)[rank::world]
        drawn = [(*self._cells[cell], place) for cell, place in zip(chosen, places, strict=True)]
        images = self.store.load([int(rows[int(place * len(rows))]) for _, _, rows, place in drawn])
        if self.augment:
            images = deform(images, self.augment, rng(self.seed, "augment", step, rank))
        return SourceBatch(
            images=images,
            labels=torch.tensor([label for _, label, _, _ in drawn]),
            domains=torch.tensor([domain for domain, _, _, _ in drawn]),
        )

    def chunks(self, limit_per_class: int | None = None) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield domain, images, labels and ids, one domain after another, in chunks of up to 256 images.

        Args:
            limit_per_class: at most so many images of a class in a domain; None for all.
        """
        for domain, by_class in self.pool.items():
            taken = {name: rows[:limit_per_class] for name, rows in by_class.items()}
            ids = torch.from_numpy(np.concatenate(list(taken.values())))
            labels = torch.tensor([self.classes.index(name) for name, rows in taken.items() for _ in rows])
            for some_ids, some_labels in zip(ids.split(CHUNK), labels.split(CHUNK), strict=True):
                yield domain, self.store.load(some_ids), some_labels, some_ids
