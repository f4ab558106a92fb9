"""What learners of initial values share: the loss of a task is a pure function of what is meta-learned."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Classifier, Head, Plan, Support
from modmeta.adaptation.descent import Weights
from modmeta.adaptation.execution import EXECUTIONS, Execution
from modmeta.adapters import UnitConfig
from modmeta.data import Episode
from modmeta.errors import ModmetaError, refuse_outside, unknown
from modmeta.learners.base import MetaLearner
from modmeta.learners.measuring import episode_support
from modmeta.learners.source import BackboneConfig, SourceConfig

HEADS = ("linear", "zero", "prototype")
HEAD = "head"
WEIGHT, BIAS = f"{HEAD}.weight", f"{HEAD}.bias"


class TaskLossLearner(MetaLearner):
    """Meta-learns the initial values of units and of a linear head, from which steps on a support set begin.

    A subclass says with :meth:`descend` what the steps are, and with :meth:`task_loss` what makes them good. Both are
    pure functions of tensors that look at no value, so that an execution backend can trace, compile and batch them.

    Args:
        backbone: the timm model that all domains share.
        units: adapter modules and where they act; what a policy would start from (gate, rate) has no effect.
        head: ``linear``, whose initial weights are learned, one row per label; ``zero``, which starts from none; or
            ``prototype``, which starts from the support's class means. The last two take any number of classes.
        ways: classes per episode that a linear head tells apart.
        adapted: globs of unit names, and the word ``head``: what the steps move.
        rate: learning rate of the steps.
        steps: steps in training.
        test_steps: steps in validation and test; None takes as many.
        execution: registered execution backend.
        execution_options: its options.
        source: source training; off by default.
        learning_rate: of Adam on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on features under the learned initial values.
        source_images: images per class and domain that the source statistics are measured on, if ever.
        cache_dir: where frozen features are kept; None keeps them in memory.
    """

    needs_sources = False

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig],
        head: str,
        ways: int,
        adapted: Sequence[str],
        rate: float,
        steps: int,
        test_steps: int | None,
        execution: str,
        execution_options: dict[str, Any] | None,
        source: SourceConfig,
        learning_rate: float,
        baselines: Sequence[str],
        source_images: int,
        cache_dir: str | None,
    ) -> None:
        # The base's head judges features without any step: the nearest class mean.
        super().__init__(backbone, units, "prototype", None, source, learning_rate, baselines, source_images, cache_dir)
        self.head.requires_grad_(False)
        self.steps = steps
        self.test_steps = steps if test_steps is None else test_steps
        _check(head, ways, {"rate": rate, "steps": steps, "test_steps": self.test_steps})
        for unit in self.model.units:
            if unit.reads:
                raise ModmetaError(
                    f"units: {unit.module.name!r} reads statistics, but a {type(self).__name__} only takes gradient "
                    f"steps; leave it out, or take the ModularMetaLearner"
                )
        width = self.model.backbone.feature_dim
        self.linear = nn.Linear(width, ways) if head == "linear" else None
        self.from_zero = head == "zero"
        self.execution: Execution = EXECUTIONS.make(execution, **(execution_options or {}))
        self.moving = self._moving(adapted, ways)
        if head == "zero" and WEIGHT not in self.moving:
            raise ModmetaError("under a zero head that does not move, no step moves anything; adapt head, too")
        self._gates = {unit.name: 1.0 for unit in self.model.units}
        self._moving_units = [u for u in self.model.units if self.model.learned_names(u)[0] in self.moving]

    # ------------------------------------------------------------------ one task, as pure functions of tensors

    @abstractmethod
    def task_loss(self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor]) -> Tensor:
        """Return a scalar whose gradient is the meta-gradient of one task.

        Args:
            parameters: everything that is meta-learned, by its name in :meth:`named_parameters`.
            task: what :meth:`task` returns.
        """

    @abstractmethod
    def descend(
        self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor], steps: int
    ) -> tuple[Weights, list[Weights]]:
        """Return all weights before the steps on the support, and after each of them.

        Args:
            parameters: everything that is meta-learned.
            task: ``support`` ``(S, 3, H, W)``, ``support_labels`` ``(S,)`` and ``classes`` ``(C,)``, all labels.
            steps: number of steps.
        """

    def support_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss on support images that the steps descend, a scalar."""
        return F.cross_entropy(logits, labels)

    def initial(
        self, parameters: Mapping[str, Tensor], task: Mapping[str, Tensor], hidden: Tensor, cut: str | None = None
    ) -> Weights:
        """Return the weights that the steps begin with: those of the units, and those of the head.

        Args:
            parameters: everything that is meta-learned.
            task: see :meth:`descend`.
            hidden: the support images, or their activations at ``cut``.
            cut: where to go on from.
        """
        start = self.initial_units(parameters)
        if self.linear is not None:
            return start | {WEIGHT: parameters["linear.weight"], BIAS: parameters["linear.bias"]}
        if self.from_zero:
            # Made from a parameter: within a transform of torch.func a constant cannot be differentiated at.
            zero, ways = 0 * next(iter(parameters.values())).flatten()[0], len(task["classes"])
            return start | {WEIGHT: zero.expand(ways, self.model.backbone.feature_dim), BIAS: zero.expand(ways)}
        features = self.weighted_features(start, hidden, cut)
        member = (task["support_labels"] == task["classes"][:, None]).to(features)
        means = member @ features / member.sum(1, keepdim=True)
        # Distances to class means are linear: -|x - c|^2 = 2 c.x - |c|^2, up to what all classes share.
        return start | {WEIGHT: 2 * means, BIAS: -means.square().sum(1)}

    def initial_units(self, parameters: Mapping[str, Tensor]) -> Weights:
        """Return the initial values of all units."""
        return {name: parameters[f"bank.prior.{row}"] for row, name in enumerate(self.bank.names)}

    def weighted_features(self, weights: Weights, x: Tensor, cut: str | None = None, stop: str | None = None) -> Tensor:
        """Return features ``(B, D)``, or activations at ``stop``, of images or of activations at ``cut``."""
        state = self.bank.initial() | {name: weights[name] for name in self.bank.names}
        return self.model(x, state, self._gates, start=cut, stop=stop)

    def weighted_logits(self, weights: Weights, x: Tensor, cut: str | None = None) -> Tensor:
        """Return logits ``(B, C)`` of images, or of activations at ``cut``."""
        return F.linear(self.weighted_features(weights, x, cut), weights[WEIGHT], weights[BIAS])

    # ------------------------------------------------------------------ training

    def task(self, episode: Episode) -> dict[str, Tensor]:
        """Return the tensors of a training episode that :meth:`task_loss` reads."""
        given = self.support_task(episode_support(episode, hide=False))
        return given | {"query": episode.query, "query_labels": episode.query_labels}

    def support_task(self, support: Support) -> dict[str, Tensor]:
        """Return the tensors of a support that :meth:`descend` reads.

        Raises:
            ModmetaError: for a support without labels, or of another number of classes than a linear head has.
        """
        if support.labels is None:
            raise ModmetaError(f"a {type(self).__name__} takes gradient steps on labelled images only; label these")
        if self.linear is not None and support.ways != self.linear.out_features:
            raise ModmetaError(
                f"the linear head was made for {self.linear.out_features} classes and is given {support.ways}; "
                f"set ways, or take head zero or prototype, which suit any number"
            )
        classes = torch.arange(support.ways, device=support.labels.device)
        return {"support": support.images, "support_labels": support.labels, "classes": classes}

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return what :meth:`task_loss` says of one training episode, a scalar."""
        return self.task_loss(self.parameters_by_name(), self.task(episode))

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return everything that is meta-learned."""
        own = {id(parameter) for parameter in self.meta_parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in own}

    def meta_gradient(
        self, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss of some episodes and its gradient, as the execution backend computes them.

        Raises:
            DivergedError: when a loss or gradient is not finite, naming step, episode and domain.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        values = {names[id(parameter)]: parameter.detach() for parameter in parameters}
        tasks = [self.task(episode) for episode in episodes]
        losses, gradients = self.execution.meta_gradient(self.task_loss, values, tasks)
        self._refuse_not_finite(episodes, losses, parameters, list(gradients.values()))
        return losses.mean(), [gradients[name] for name in values]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for what is meta-learned and, with a source phase, the optimiser of the backbone."""
        _, *rest = super().configure_optimizers()
        return [torch.optim.Adam(self.meta_parameters(), lr=self.learning_rate), *rest]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the execution backend has chosen."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["execution"] = self.execution.choice

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, and let the execution backend abide by its choice.

        Raises:
            ModmetaError: saying what was found and what was expected.
        """
        super().on_load_checkpoint(checkpoint)
        self.execution.choice = checkpoint.get("execution")

    # ------------------------------------------------------------------ adaptation

    def adapt(self, support: Support) -> Adapted:
        """Take the steps of a test on a labelled support.

        Raises:
            ModmetaError: for a support without labels, or of another number of classes than a linear head has.
        """
        start, path = self.descend(self.parameters_by_name(), self.support_task(support), self.test_steps)
        last = path[-1]
        state = self.bank.initial() | {name: last[name] for name in self.bank.names}
        weight = last[WEIGHT].T
        center, scale = weight.new_zeros(len(weight)), weight.new_ones(())
        classifier = Classifier(weight, last[BIAS], center, scale, normalize=False)
        return Adapted(state, self._plan([start, *path]), classifier, support.classes)

    def evaluate(self, episode: Episode) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Return query logits per system, and further figures; ``none`` is the nearest class mean without a step."""
        support = episode_support(episode, hide=False)
        state, plan = self.learned(support.images)
        features, query = (self.features(images, state, plan) for images in (support.images, episode.query))
        logits: dict[str, Tensor] = {}
        for name, head in {**self.baselines, "none": self.head}.items():
            assert isinstance(head, Head)
            logits[name] = self.fit_head(features, support, head)(query)
        begin = time.perf_counter()
        adapted = self.adapt(support)
        seconds = time.perf_counter() - begin
        logits["adapted"] = self.logits(adapted, episode.query)
        return logits, {"adapted": {**self.updated(adapted), "seconds": seconds}}

    def updated(self, adapted: Adapted) -> dict[str, float]:
        """Return the shares of units and of the backbone's parameters that the steps moved."""
        moved = adapted.plan.keeping([unit.name for unit in self._moving_units])
        return super().updated(replace(adapted, plan=moved))

    def _plan(self, path: list[Weights]) -> Plan:
        """Return what was done as a plan: every unit open, and how far each step moved it."""
        idle, units = self.idle_plan(), self.model.units
        if not units:
            return idle

        def moved(names: list[str], before: Weights, after: Weights) -> Tensor:
            return torch.cat([(after[name] - before[name]).flatten() for name in names]).square().mean().sqrt()

        names = [self.model.learned_names(unit) for unit in units]
        rates = torch.stack([torch.stack([moved(own, *pair) for pair in pairwise(path)]) for own in names])
        return replace(idle, gates=torch.ones_like(idle.gates), rates=rates.detach())

    def _moving(self, adapted: Sequence[str], ways: int) -> dict[str, torch.Size]:
        """Return the names and shapes of the tensors that the steps move."""
        names = {unit.name: self.model.learned_names(unit) for unit in self.model.units} | {HEAD: [WEIGHT, BIAS]}
        for glob in adapted:
            if not any(fnmatchcase(name, glob) for name in names):
                raise unknown("name in adapted:", glob, names)
        chosen = [t for name, own in names.items() if any(fnmatchcase(name, glob) for glob in adapted) for t in own]
        if not chosen:
            raise ModmetaError("adapted is empty, so steps would move nothing; name units, or head")
        shapes = {name: tensor.shape for name, tensor in zip(self.bank.names, self.bank.prior, strict=True)}
        shapes |= {WEIGHT: torch.Size([ways, self.model.backbone.feature_dim]), BIAS: torch.Size([ways])}
        return {name: shapes[name] for name in chosen}


def _check(head: str, ways: int, positive: Mapping[str, float]) -> None:
    if head not in HEADS:
        raise unknown("head to start from:", head, HEADS)
    if ways < 2:
        raise ModmetaError(f"ways is {ways}; a head tells 2 classes or more apart")
    refuse_outside(positive, 0, above=True)
