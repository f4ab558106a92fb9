"""ReptileLearner: initial values that move towards where training on each task ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from modmeta.adaptation import Support
from modmeta.adaptation.descent import Move, Weights, descend
from modmeta.adapters import UnitConfig
from modmeta.data import Episode, SourceBatch
from modmeta.errors import ModmetaError, unknown
from modmeta.learners.source import BackboneConfig, SourceConfig
from modmeta.learners.task_loss import TaskLossLearner


class ReptileLearner(TaskLossLearner):
    """Trains on each task by itself and moves the initial values towards the results.

    Nichol et al., "On First-Order Meta-Learning Algorithms", 2018, in the batched version: ``w + e * mean(v - w)`` for
    initial values ``w``, the weights ``v`` that the steps on each episode end with, and a rate ``e`` that falls
    linearly to 0. No derivative goes through the steps, and no query is held out in training: the steps see support
    and query, shuffled, in small batches. In a test they see the support alone.

    Args:
        backbone: the timm model that all domains share.
        units: adapter modules and where they act; what a policy would start from (gate, rate) has no effect.
        head: ``linear``, whose initial weights are learned, one row per label; ``zero``, which starts from none in
            every task; or ``prototype``, which starts from the class means.
        ways: classes per episode that a linear head tells apart.
        adapted: globs of unit names, and the word ``head``: what the steps move, and so what is learned.
        optimizer: of the steps: ``sgd``, or ``adam`` without momentum, as the paper's, fresh for every task.
        rate: its learning rate.
        steps: steps in training.
        test_steps: steps in validation and test; None takes as many.
        batch_size: images in a step; None takes all.
        outer_rate: first share of the way to the results that the initial values move.
        execution: registered execution backend.
        execution_options: its options.
        source: source training; off by default.
        baselines: heads that are measured beside this learner, on features under the learned initial values.
        source_images: images per class and domain that the source statistics are measured on, if ever.
        cache_dir: where frozen features are kept; None keeps them in memory.

    Raises:
        ModmetaError: for settings that make no sense.
    """

    largest_gradient = float("inf")

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig] = (),
        head: str = "linear",
        ways: int = 5,
        adapted: Sequence[str] = ("*",),
        optimizer: Literal["adam", "sgd"] = "adam",
        rate: float = 1e-3,
        steps: int = 5,
        test_steps: int | None = 50,
        batch_size: int | None = 10,
        outer_rate: float = 1.0,
        execution: str = "loop",
        execution_options: dict[str, Any] | None = None,
        source: SourceConfig = SourceConfig(),
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            backbone, units, head, ways, adapted, rate, steps, test_steps, execution, execution_options, source,
            outer_rate, baselines, source_images, cache_dir,
        )  # fmt: skip
        if optimizer not in ("adam", "sgd"):
            raise unknown("optimizer of the steps:", optimizer, ("adam", "sgd"))
        if batch_size is not None and batch_size < 1:
            raise ModmetaError(f"batch_size must be 1 or more, or null for all images, got {batch_size}")
        if not 0 < outer_rate <= 1:
            raise ModmetaError(f"outer_rate must lie in 0..1, above 0, got {outer_rate}")
        self.optimizer = optimizer
        self.rate = rate
        self.batch_size = batch_size

    def task_loss(self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the last step; its gradient is the initial values minus what the steps end with."""
        start, path, loss = self._train(parameters, task, self.steps)
        way = torch.stack([((start[n] - path[-1][n]).detach() * start[n]).sum() for n in self.moving]).sum()
        return loss.detach() + way - way.detach()

    def descend(
        self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor], steps: int
    ) -> tuple[Weights, list[Weights]]:
        """Return all weights before the steps on the support, and after each of them."""
        start, path, _ = self._train(parameters, task, steps)
        return start, path

    def task(self, episode: Episode) -> dict[str, Tensor]:
        """Return all images of a training episode as the support, and the order of its batches."""
        given = super().task(episode)
        support = torch.cat([given["support"], given["query"]])
        labels = torch.cat([given["support_labels"], given["query_labels"]])
        batches = self._batches(len(support), self.steps, episode.index).to(support.device)
        return {"support": support, "support_labels": labels, "classes": given["classes"], "batches": batches}

    def support_task(self, support: Support) -> dict[str, Tensor]:
        """Return the tensors of a support, and the order of its batches, the same for as many images."""
        batches = self._batches(len(support.images), self.test_steps, 0).to(support.images.device)
        return super().support_task(support) | {"batches": batches}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return plain SGD for the initial values, and the backbone's optimiser where there is a source phase."""
        _, *rest = super().configure_optimizers()
        return [torch.optim.SGD(self.meta_parameters(), lr=self.learning_rate), *rest]

    def training_step(self, batch: list[Episode] | SourceBatch, batch_idx: int) -> None:
        """Take one step at the outer rate of the moment."""
        optimizers = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        step, total = self.episode_step(batch_idx)
        for group in first.param_groups:
            group["lr"] = self.learning_rate * (1 - step / max(total, 1))
        super().training_step(batch, batch_idx)

    def _train(
        self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor], steps: int
    ) -> tuple[Weights, list[Weights], Tensor]:
        start, losses = self.initial(parameters, task, task["support"]), []

        def loss(leaves: Weights, step: int) -> Tensor:
            chosen = task["batches"][step]
            value = self.support_loss(
                self.weighted_logits(start | leaves, task["support"][chosen]), task["support_labels"][chosen]
            )
            losses.append(value)
            return value

        move = without_momentum(self.rate) if self.optimizer == "adam" else self._sgd
        path = descend({name: start[name] for name in self.moving}, loss, move, steps, second_order=False)
        return start, [start | weights for weights in path], losses[-1]

    def _sgd(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        return {name: w - self.rate * gradients[name] for name, w in weights.items()}

    def _batches(self, images: int, steps: int, seed: int) -> Tensor:
        """Return the rows ``(steps, B)`` of every step: each image comes once before any comes again."""
        size = min(self.batch_size or images, images)
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-steps * size // images)
        rows = torch.cat([torch.randperm(images, generator=generator) for _ in range(rounds)])
        return rows[: steps * size].view(steps, size)


def without_momentum(rate: float, decay: float = 0.999, eps: float = 1e-8) -> Move:
    """Return the steps of Adam with ``beta1 = 0``, fresh: to be used for one descent."""
    square: Weights = {}

    def move(weights: Weights, gradients: Weights, step: int) -> Weights:
        moved = {}
        for name, g in gradients.items():
            square[name] = (1 - decay) * g * g + (decay * square[name] if step else 0.0)
            size = (square[name] / (1 - decay ** (step + 1))).sqrt()
            moved[name] = weights[name] - rate * g / (size + eps)
        return moved

    return move
