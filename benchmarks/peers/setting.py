"""What every entry of the throughput benchmark is given: the same network, the same weights and the same tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.data import Episode

Gradients = dict[str, Tensor]
"""The mean gradient over the tasks, by the names of :class:`Published`."""

Entry = Callable[[], Gradients]
"""Computes the meta-gradient of all tasks once."""

METHODS = ("maml", "fomaml", "anil", "reptile", "meta_sgd", "protonet")


@dataclass(frozen=True)
class Setting:
    """One cell of the benchmark.

    Attributes:
        method: one of ``METHODS``.
        steps: inner steps.
        tasks: tasks per meta-gradient.
        width: channels of the four blocks.
        double: in float64.
        ways: classes.
        shots: support images per class; also Reptile's images in a step, per class.
        queries: query images per class.
        rate: of the inner steps.
        seed: of weights and pixels.
    """

    method: str
    steps: int
    tasks: int = 16
    width: int = 64
    double: bool = False
    ways: int = 5
    shots: int = 1
    queries: int = 15
    rate: float = 0.125  # exact in float32, as Meta-SGD keeps it
    seed: int = 0

    def episodes(self) -> list[Episode]:
        """Return grey noise: what is measured depends on shapes alone."""
        generator = torch.Generator().manual_seed(self.seed)
        labels, none = torch.arange(self.ways), torch.zeros(0, dtype=torch.long)
        names = tuple(str(way) for way in range(self.ways))

        def pixels(per_class: int) -> Tensor:
            shape = (per_class * self.ways, 1, 28, 28)
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).expand(-1, 3, -1, -1)

        return [
            Episode(
                index, "noise", names, self.shots, pixels(self.shots), labels.repeat_interleave(self.shots), none,
                pixels(self.queries), labels.repeat_interleave(self.queries), none,
            )
            for index in range(self.tasks)
        ]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """An episode as the peers take it: images ``(N, 1, 28, 28)`` in 0..1, and Reptile's batches ``(steps, B)``."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    batches: Tensor | None = None


class Published(nn.Module):
    """The four-block network as it is usually written, with PyTorch's own batch normalisation."""

    def __init__(self, width: int, ways: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(_block(inputs, width) for inputs in (1, width, width, width)), nn.Flatten())
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(x))


def _block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, track_running_stats=False),
        nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip


def mean_of(parameters: dict[str, Tensor], per_task: list[tuple[Tensor, ...]]) -> Gradients:
    """Return the mean over tasks, by name."""
    return {name: torch.stack(own).mean(0) for name, *own in zip(parameters, *per_task, strict=True)}


def loss_of(net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(net(images), labels)
