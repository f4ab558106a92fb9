"""Which episodes a step of a rank consists of, and the loader that draws them.

The samplers derive from DistributedSampler because Lightning leaves such a sampler as it is, where it would
replace any other under DDP, and because it tells it the epoch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from modmeta.data.draw import EpisodeDraw
from modmeta.data.episode import Episode, SourceBatch
from modmeta.data.source import SourceImages
from modmeta.errors import ModmetaError


@dataclass(frozen=True)
class SourceStep:
    """Asks for a rank's part of a supervised batch."""

    step: int
    rank: int
    world: int


Ask = list[int] | SourceStep
Item = list[Episode] | SourceBatch


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class TrainSampler(DistributedSampler[Ask]):
    """Yields what each training step of an epoch asks for: source batches first, then episodes.

    Episode numbers go on from epoch to epoch. Those of a step are dealt out to the ranks, so that all
    ranks together draw what one alone would.

    Args:
        steps_per_epoch: steps in an epoch.
        episodes_per_step: episodes in a step, over all ranks.
        source_epochs: epochs of source batches before the first episode.
        batch_size: images in a source batch, over all ranks.
        rank: this process's rank.
        world: number of ranks.
        steps_done: says how many steps of the epoch lie behind already, when a pass begins; not 0 in a resumed epoch.

    Raises:
        ModmetaError: if the ranks cannot share a step's episodes or batch evenly.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        episodes_per_step: int,
        source_epochs: int = 0,
        batch_size: int = 1,
        rank: int = 0,
        world: int = 1,
        steps_done: Callable[[], int] = int,
    ) -> None:
        super().__init__(range(steps_per_epoch), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        _refuse_remainder("episodes_per_step", episodes_per_step, world)
        if source_epochs > 0:
            _refuse_remainder("batch_size", batch_size, world)
        self.steps_per_epoch = steps_per_epoch
        self.episodes_per_step = episodes_per_step
        self.source_epochs = source_epochs
        self.steps_done = steps_done

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Ask]:
        in_source = self.epoch < self.source_epochs
        first_step = (self.epoch if in_source else self.epoch - self.source_epochs) * self.steps_per_epoch
        for step in range(first_step + self.steps_done(), first_step + self.steps_per_epoch):
            if in_source:
                yield SourceStep(step, self.rank, self.num_replicas)
            else:
                first = step * self.episodes_per_step
                yield list(range(first + self.rank, first + self.episodes_per_step, self.num_replicas))


class EvaluationSampler(DistributedSampler[Ask]):
    """Yields every episode once over all ranks, one at a time, without padding.

    Ranks may differ by one episode. That is safe under DDP, whose wrapper exchanges buffers on the first
    step without gradients only, as long as every rank has a step.

    Raises:
        ModmetaError: if there are fewer episodes than ranks.
    """

    def __init__(self, count: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(range(count), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        if count < world:
            raise ModmetaError(f"{count} episodes are too few for {world} devices; use fewer devices")
        self._indices = range(rank, count, world)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Ask]:
        return ([index] for index in self._indices)


class EpisodeDataset(Dataset[Item | ModmetaError]):
    """Answers what a sampler asks for; used by the loader's workers."""

    def __init__(self, draw: EpisodeDraw, source: SourceImages | None = None) -> None:
        self.draw = draw
        self.source = source

    def __getitem__(self, ask: Ask) -> Item | ModmetaError:
        try:
            if isinstance(ask, SourceStep):
                assert self.source is not None
                return self.source.batch(ask.step, ask.rank, ask.world)
            return [self.draw[index] for index in ask]
        except ModmetaError as error:
            return error


class EpisodeLoader(DataLoader[Item]):
    """A data loader of whole steps.

    An error that the user can mend is raised here rather than in the worker that found it, from where
    it would come wrapped in the worker's traceback.
    """

    def __init__(self, dataset: EpisodeDataset, sampler: DistributedSampler[Ask], num_workers: int) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            sampler=sampler,
            batch_size=None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise every pass would advance the global one
        )

    def __iter__(self) -> Any:
        """Yield one step after another."""
        for item in super().__iter__():
            if isinstance(item, ModmetaError):
                raise item
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, and so tell Lightning that it can resume within an epoch: the sampler asks where."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    # A signal to the whole group must not take the images from the step that the parent finishes first.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def _refuse_remainder(name: str, value: int, world: int) -> None:
    if value % world:
        raise ModmetaError(f"{name}={value} cannot be shared by {world} devices; take a multiple of {world}")
