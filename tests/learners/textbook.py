"""What the tests of the metric, memory and amortised learners share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from torch import Tensor

from modmeta.adaptation import Support
from modmeta.data import DomainDataModule
from modmeta.learners import MetaLearner


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether both hold the same numbers under the same names."""
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def support_of(data: DomainDataModule, index: int = 0) -> tuple[Support, Tensor, Tensor]:
    """Return the support of a training episode, its query and the query's labels."""
    data.setup()
    episode = data.episode("train", index)
    support = Support(episode.support, episode.support_labels, episode.classes)
    return support, episode.query, episode.query_labels


@torch.no_grad()
def accuracies(learner: MetaLearner, data: DomainDataModule, count: int = 40) -> Tensor:
    """Return the query accuracies ``(count,)`` on training episodes far behind those of a fit."""
    found = []
    for index in range(10_000, 10_000 + count):
        support, query, labels = support_of(data, index)
        predicted = learner.logits(learner.adapt(support), query).argmax(1)
        found.append((predicted == labels).double().mean())
    return torch.stack(found)


def losses_of_a_fit(learner: MetaLearner, data: DomainDataModule, steps: int = 15, rate: float = 1e-2) -> list[float]:
    """Return the mean loss on four episodes before every step of fitting those, and after the last."""
    data.setup()
    episodes = [data.episode("train", index) for index in range(4)]
    parameters = learner.meta_parameters()
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for _ in range(steps + 1):
        loss, gradients = learner.meta_gradient(episodes, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(float(loss))
    return losses


def assert_resumes(make: Callable[[], MetaLearner], data: Callable[[], DomainDataModule], folder: Path) -> None:
    """Assert that a fit that is resumed after its first epoch ends where one in a single go does."""
    half, whole, resumed = make(), make(), make()
    first = tiny.trainer(folder, 1)
    first.fit(half, datamodule=data())
    first.save_checkpoint(folder / "half.ckpt")
    tiny.trainer(folder, 2).fit(whole, datamodule=data())
    tiny.trainer(folder, 2).fit(resumed, datamodule=data(), ckpt_path=str(folder / "half.ckpt"))
    assert not same(tensors(resumed), tensors(half))
    assert same(tensors(resumed), tensors(whole))
