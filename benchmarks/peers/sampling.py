"""Episodes from images in memory, with as many classes and images per class as Omniglot's training characters."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modmeta.data.draw import TrainingEpisodes
from modmeta.data.images import Ids, ImageStore

CLASSES, IMAGES, SIZE = 1000, 20, 28
WAYS, SHOTS, QUERIES = 5, 1, 15
Sampler = Callable[[int], object]


class InMemory(ImageStore):
    """Random grey images of one domain."""

    def __init__(self) -> None:
        rows = np.arange(CLASSES * IMAGES)
        super().__init__(["noise"], [str(c) for c in range(CLASSES)], rows * 0, rows // IMAGES, SIZE, "noise")
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (len(rows), 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        self.pixels = self.images.numpy()

    def load(self, ids: Ids) -> Tensor:
        """Return images, uint8, whose three channels are one in memory."""
        return torch.from_numpy(self.pixels.take(ids, 0)).expand(-1, 3, -1, -1)


def modmeta(store: InMemory) -> Sampler:
    """Return the draw of training episodes."""
    pool = {"noise": {name: store.ids("noise", name) for name in store.classes}}
    draw = TrainingEpisodes(store, pool, (WAYS, WAYS), QUERIES, (), 0.0, 0, (SHOTS, SHOTS))
    return draw.__getitem__


def learn2learn(store: InMemory) -> Sampler:
    """Return a ``Taskset`` with the usual transforms."""
    from learn2learn.data import MetaDataset, Taskset
    from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels

    images = Pairs(store)
    data = MetaDataset(images)
    moves = [NWays(data, WAYS), KShots(data, SHOTS + QUERIES), LoadData(data), RemapLabels(data),
             ConsecutiveLabels(data)]  # fmt: skip
    tasks = Taskset(data, moves, num_tasks=-1)
    return lambda index: tasks.sample()


def easyfsl(store: InMemory) -> Sampler:
    """Return the task sampler under a data loader."""
    from easyfsl.samplers import TaskSampler

    data = Pairs(store)
    sampler = TaskSampler.__new__(TaskSampler)
    torch.utils.data.Sampler.__init__(sampler)  # its own constructor passes an argument that PyTorch has removed
    sampler.n_way, sampler.n_shot, sampler.n_query, sampler.n_tasks = WAYS, SHOTS, QUERIES, 10**9
    sampler.items_per_label = {c: list(range(c * IMAGES, (c + 1) * IMAGES)) for c in range(CLASSES)}
    loader = iter(DataLoader(data, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn))
    return lambda index: next(loader)


class Pairs(Dataset):
    """Images and labels one by one, as the peers take them."""

    def __init__(self, store: InMemory) -> None:
        self.images, self.labels = store.images, store.row_classes.tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


SAMPLERS: dict[str, Callable[[InMemory], Sampler]] = {
    "modmeta": modmeta, "learn2learn": learn2learn, "easyfsl": easyfsl,
}  # fmt: skip

MODULES = {"learn2learn": "learn2learn.data", "easyfsl": "easyfsl.samplers"}


def tasks_per_cpu_second(sample: Sampler, seconds: float) -> float:
    """Return how many tasks a second of processor time gives."""
    for index in range(20):
        sample(index)
    begin, count = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds:
        sample(count)
        count += 1
    return count / spent
