"""When memory runs out in a training step: smaller parts where that changes rounding alone, and else advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from modmeta.data import Episode
from modmeta.errors import ModmetaError


class Learner(Protocol):
    """What has to be known of a learner: how it computes some episodes, and how many at once it may."""

    chunk: int | None

    def meta_gradient(
        self, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss of some episodes and its gradient."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that no memory was left, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def gradient_within_memory(
    learner: Learner, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter], where: str
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss of some episodes and its gradient, of half as many at once as often as memory runs out.

    Args:
        learner: its ``chunk`` is halved, and stays so.
        episodes: those of a step.
        parameters: what the gradient is of.
        where: the step, for messages.

    Raises:
        ModmetaError: if memory does not suffice for a single episode.
    """
    while True:
        size = min(learner.chunk or len(episodes), len(episodes))
        try:
            return _in_chunks(learner, episodes, parameters, size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            if size == 1:
                raise ModmetaError(
                    f"{where}: out of memory with one episode at once; choose a smaller data.image_size, fewer "
                    f"data.shots, data.queries or inner steps, or fewer and later units"
                ) from error
        # Outside of the handler, whose traceback keeps the tensors of the failed attempt alive.
        learner.chunk = (size + 1) // 2
        rank_zero_warn(f"{where}: out of memory with {size} episodes at once; going on with {learner.chunk} at once")


def _in_chunks(
    learner: Learner, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter], size: int
) -> tuple[Tensor, list[Tensor]]:
    chunks = [episodes[first : first + size] for first in range(0, len(episodes), size)]
    total, sums = learner.meta_gradient(chunks[0], parameters)
    if len(chunks) == 1:
        return total, sums
    total = total * size
    sums = [gradient * size for gradient in sums]
    for chunk in chunks[1:]:
        loss, gradients = learner.meta_gradient(chunk, parameters)
        total = total + loss * len(chunk)
        sums = [have + more * len(chunk) for have, more in zip(sums, gradients, strict=True)]
    return total / len(episodes), [gradient / len(episodes) for gradient in sums]
