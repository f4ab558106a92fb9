"""Fine-tuning that chooses which units to update: by their place, by chance, or by constants found beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modmeta.adaptation import Plan, read_beyond, reading_units, refuse_tuning, stratified_folds, tune_statistics
from modmeta.adapters import Unit, UnitConfig
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.readout import ClosedForm
from modmeta.evaluation.systems.system import Outcome, Task, register_system
from modmeta.evaluation.systems.unit_system import GradientSystem, Optimizer
from modmeta.learners import MetaLearner


@register_system("constant")
class Constant(GradientSystem):
    """The gates and rates of the units' configurations, for every domain.

    With the gates and rates that are best on average, this is what a policy has to beat.

    Args:
        units: which adapter modules act where, each with its gate and rate.
        steps: number of steps on the whole support.
        factor: on all rates.
        optimizer: ``rms`` takes steps as the policy does; ``adam``, ``sgd`` or ``adadelta``.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
        prior_share: weight of the unadapted model in the answer, as a policy's learner may give it.
        statistics_depths: shares of the way through the backbone down to which units that only read statistics may
            begin, of which the best on the labelled support is taken, as a policy's learner may do; the recipe is then
            as constant as its candidates.
        statistics_strengths: factors on the gates of those units, likewise.
    """

    def __init__(
        self,
        units: Sequence[UnitConfig],
        steps: int = 3,
        factor: float = 1.0,
        optimizer: Optimizer = "rms",
        head: str | None = None,
        head_options: dict[str, float] | None = None,
        prior_share: float = 0.0,
        statistics_depths: Sequence[float] = (1.0,),
        statistics_strengths: Sequence[float] = (),
    ) -> None:
        super().__init__(units, steps, factor, optimizer, head, head_options, prior_share)
        refuse_tuning(statistics_depths, statistics_strengths, "constant: ")
        self.statistics_depths = tuple(statistics_depths)
        self.statistics_strengths = tuple(statistics_strengths)

    def gates(self, depth: float | None = None) -> dict[str, float]:
        """Return the configured gates, without statistics beyond a depth: the first one, unless it is given."""
        deep = read_beyond(self.model.units, self.statistics_depths[0] if depth is None else depth)
        return {unit.name: unit.gate for unit in self.model.units if unit.name not in deep}

    def adapt(self, task: Task) -> Outcome:
        """Take the steps at each unit's own rate."""
        labels, known = task.support.labels, task.learner.knows_classes(task.support, self.head)
        something_to_try = self.statistics_strengths or len(self.statistics_depths) > 1
        judged = labels is not None and bool(stratified_folds(labels, 2, known))
        gates = self._tuned(task) if something_to_try and judged else self.gates()
        return self.tune(task, gates, {unit.name: self.rate * unit.rate for unit in self.model.units})

    def _tuned(self, task: Task) -> dict[str, float]:
        """Return the gates with statistics as deep and strong as serves the support best."""
        readout, initial, images = ClosedForm(task, self.head), self.initial(task), task.support.images

        @torch.no_grad()
        def losses(plan: Plan | None) -> torch.Tensor:
            logits = before = readout.held_out(task.features)
            if plan is not None:
                features, _ = self.model.observe(images, initial, plan.gate_of())
                logits = torch.lerp(readout.held_out(features), before, self.prior_share)
            return readout.losses(logits)

        plans = {depth: self.plan(self.gates(depth), {}, 0) for depth in self.statistics_depths}
        reading = [unit.name for unit in reading_units(self.model.units)]
        plan, _, _ = tune_statistics(plans, reading, self.statistics_strengths, losses)
        return {name: float(gate) for name, gate in plan.gate_of().items()}


@register_system("sparse_update")
class SparseUpdate(GradientSystem):
    """Only the last few units are updated, the same for every domain.

    The outcome of the offline search of Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022, without
    the search: whole layers, from the last one on.

    Args:
        units: which adapter modules act where; as a rule one layer per unit (``group: site``).
        last: number of learning units to update.
        steps: number of steps on the whole support.
        rate: learning rate.
        optimizer: ``rms``, ``adam``, ``sgd`` or ``adadelta``.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
    """

    def __init__(
        self,
        units: Sequence[UnitConfig],
        last: int = 12,
        steps: int = 10,
        rate: float = 0.003,
        optimizer: Optimizer = "adam",
        head: str | None = None,
        head_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__(units, steps, rate, optimizer, head, head_options)
        if last < 1:
            raise ModmetaError(f"sparse_update: last must be 1 or more, got {last}")
        self.last = last

    def adapt(self, task: Task) -> Outcome:
        """Take the steps on the last units."""
        learners = sorted((unit for unit in self.model.units if unit.learns), key=lambda unit: unit.depth)
        return self.tune(task, self.gates_of(learners[-self.last :]))


@register_system("random_gates")
class RandomGates(GradientSystem):
    """Random units at the backward cost of a budget: what choosing has to beat.

    The earliest learning unit that the budget reaches is always updated, so that every episode costs the same; of
    those behind it, each with a probability.

    Args:
        units: which adapter modules act where.
        budget: share of the whole network's backward multiply-accumulates that a step may take.
        share: probability of the other units within the budget.
        seed: of the choice, which is one of the episode's support.
        steps: number of steps on the whole support.
        rate: learning rate.
        optimizer: ``rms``, ``adam``, ``sgd`` or ``adadelta``.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
    """

    def __init__(
        self,
        units: Sequence[UnitConfig],
        budget: float = 0.5,
        share: float = 0.5,
        seed: int = 0,
        steps: int = 10,
        rate: float = 0.003,
        optimizer: Optimizer = "adam",
        head: str | None = None,
        head_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__(units, steps, rate, optimizer, head, head_options)
        self.budget = budget
        self.share = share
        self.seed = seed

    def prepare(self, learner: MetaLearner) -> None:
        """Find the units within the budget."""
        super().prepare(learner)
        within = [unit for unit in self.model.units if unit.learns and self.backward_share([unit]) <= self.budget]
        if not within:
            raise ModmetaError(f"random_gates: no learning unit lies within the budget {self.budget}; raise it")
        self.within = sorted(within, key=lambda unit: unit.depth)

    def adapt(self, task: Task) -> Outcome:
        """Draw the units and take the steps on them."""
        return self.tune(task, self.gates_of(self.drawn(task)))

    def drawn(self, task: Task) -> list[Unit]:
        """Return the learning units of an episode."""
        random = rng(self.seed, "random gates", task.episode.domain, *task.episode.support_ids.tolist())
        first, *others = self.within
        return [first, *(unit for unit, u in zip(others, random.random(len(others)), strict=True) if u < self.share)]
