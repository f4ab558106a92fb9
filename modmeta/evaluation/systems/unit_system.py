"""Systems with units of their own on the shared backbone, and gradient steps on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch

from modmeta.adaptation import DivergedError, Head, Plan, backward_macs, inner_loop, read_statistics
from modmeta.adapters import AdaptedBackbone, State, Unit, UnitConfig, check_alive
from modmeta.errors import refuse_outside, unknown
from modmeta.evaluation.systems.closed_form import make_head
from modmeta.evaluation.systems.readout import ClosedForm, Readout
from modmeta.evaluation.systems.system import Outcome, System, Task
from modmeta.learners import MetaLearner

Optimizer = Literal["rms", "adam", "sgd", "adadelta"]
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adadelta": torch.optim.Adadelta,
}


class UnitSystem(System):
    """Base of the systems that put units on the backbone and a closed-form head behind it.

    Units that learn count whole; a unit that reads statistics counts as much as its configuration's ``gate`` says.

    Args:
        units: which adapter modules act where.
        head: registered name of a head; None takes the learner's own, with the strengths that it has learned.
        head_options: options of the head.
    """

    model: AdaptedBackbone
    prior_share = 0.0
    """Weight of the unadapted model in the answer."""

    def __init__(
        self, units: Sequence[UnitConfig], head: str | None = None, head_options: dict[str, float] | None = None
    ) -> None:
        self.units = tuple(units)
        self.head_name = head
        self.head_options = head_options

    def prepare(self, learner: MetaLearner) -> None:
        """Build the units on the learner's backbone, and the head."""
        super().prepare(learner)
        self.model = self.build_model(learner)
        self.head: Head = make_head(learner, self.head_name, self.head_options)

    def build_model(self, learner: MetaLearner) -> AdaptedBackbone:
        """Return the learner's backbone with this system's units."""
        model = AdaptedBackbone(learner.model.backbone, self.units)
        check_alive(model)
        return model

    def initial(self, task: Task) -> State:
        """Return the state that the units start from."""
        return {name: tensor.to(self.learner.device) for name, tensor in self.model.fresh().items()}

    def gates(self) -> dict[str, float]:
        """Return the gate of every unit."""
        return {unit.name: 1.0 if unit.learns else unit.gate for unit in self.model.units}

    def plan(self, gates: Mapping[str, float], rates: Mapping[str, float], steps: int) -> Plan:
        """Return the plan of constant gates and rates by unit name; a missing one is 0."""
        names = tuple(unit.name for unit in self.model.units)
        device = self.learner.device
        rows = torch.tensor([rates.get(name, 0.0) for name in names], device=device)
        zero = torch.zeros((), device=device)
        return Plan(
            units=names,
            gates=torch.tensor([gates.get(name, 0.0) for name in names], device=device),
            rates=rows[:, None].expand(-1, steps),
            decay=torch.zeros(len(names), device=device),
            bank=torch.ones(len(names), 1, device=device),
            ridge=zero + 1,
            gain=zero,
            gain_log_variance=zero,
        )

    def outcome(self, task: Task, state: State, gates: Mapping[str, float], readout: Readout, macs: int = 0) -> Outcome:
        """Fit the classifier to the adapted features and return what came of it."""
        active = self.model.active(gates)
        classifier = readout.classifier(self._features(task, state, gates) if active else task.features)
        shared = active and self.prior_share
        prior = task.learner.fit_head(task.features, task.support, self.head) if shared else None

        def classify(query: Task) -> torch.Tensor:
            if not active:
                return classifier(query.query_features)
            with torch.no_grad():
                logits = classifier(self.model(query.episode.query, state, gates))
            return logits if prior is None else torch.lerp(logits, prior(query.query_features), self.prior_share)

        return Outcome(classify, sum(unit.cost.parameters for unit in active), macs)

    @torch.no_grad()
    def _features(self, task: Task, state: State, gates: Mapping[str, float]) -> torch.Tensor:
        return self.model(task.support.images, state, gates)


class GradientSystem(UnitSystem):
    """Base of the systems that take gradient steps on units with constant rates.

    Args:
        units: which adapter modules act where.
        steps: number of steps on the whole support.
        rate: learning rate.
        optimizer: ``rms`` takes steps of which the rate is the root mean square size, per unit; ``adam``, ``sgd``
            (momentum 0.9) and ``adadelta`` are PyTorch's.
        head: registered name of a head; None takes the learner's own, with the strengths that it has learned.
        head_options: options of the head.
        prior_share: weight of the unadapted model in the answer, as a policy's learner may give it.
    """

    def __init__(
        self,
        units: Sequence[UnitConfig],
        steps: int = 10,
        rate: float = 0.003,
        optimizer: Optimizer = "adam",
        head: str | None = None,
        head_options: dict[str, float] | None = None,
        prior_share: float = 0.0,
    ) -> None:
        super().__init__(units, head, head_options)
        if optimizer not in get_args(Optimizer):
            raise unknown("optimizer", optimizer, get_args(Optimizer))
        refuse_outside({"prior_share": prior_share}, 0, 1)
        self.steps = steps
        self.rate = rate
        self.optimizer = optimizer
        self.prior_share = prior_share

    def readout(self, task: Task) -> Readout:
        """Return the loss and the classifier behind the features."""
        return ClosedForm(task, self.head)

    def tune(
        self, task: Task, gates: Mapping[str, float], rates: Mapping[str, float] | None = None, before: int = 0
    ) -> Outcome:
        """Take the steps.

        Args:
            task: without labels, nothing but statistics is adapted.
            gates: how much of each unit counts; a missing one is closed.
            rates: rate of each unit; None is the system's rate for all.
            before: multiply-accumulates of backward passes that were spent already.
        """
        readout = self.readout(task)
        rates = dict.fromkeys(gates, self.rate) if rates is None else rates
        steps = self.steps if self.learns_from(task) else 0
        plan = self.plan(gates, rates, steps)
        images = task.support.images
        state = read_statistics(self.model, self.initial(task), plan, images)
        if self.optimizer == "rms":
            state, _ = inner_loop(self.model, state, plan, images, readout.loss, statistics=state)
        else:
            state = self.descend(task, state, gates, rates, readout, steps)
        macs = before + backward_macs(self.model, self.model.active(gates), len(images), steps)
        return self.outcome(task, state, gates, readout, macs)

    def learns_from(self, task: Task) -> bool:
        """Whether the task has what the loss needs."""
        return task.support.labels is not None

    def descend(
        self,
        task: Task,
        state: State,
        gates: Mapping[str, float],
        rates: Mapping[str, float],
        readout: Readout,
        steps: int,
    ) -> State:
        """Return the state after some steps of a PyTorch optimiser.

        Raises:
            DivergedError: if the loss is not finite.
        """
        learners = [unit for unit in self.model.active(gates) if unit.learns]
        leaves = {unit.name: self.leaves(unit, state) for unit in learners}
        groups = [{"params": list(own.values()), "lr": rates[unit]} for unit, own in leaves.items()]
        groups += [{"params": list(readout.leaves), "lr": self.rate}] if readout.leaves else []
        if not groups or not steps:
            return state
        start, hidden = self.hidden(task, state, gates, learners)
        moving = {name: leaf for own in leaves.values() for name, leaf in own.items()}
        optimizer = _OPTIMIZERS[self.optimizer](groups)
        with torch.enable_grad():
            for step in range(steps):
                optimizer.zero_grad()
                loss = readout.loss(self.model(hidden, state | moving, gates, start=start))
                if not torch.isfinite(loss):
                    raise DivergedError(f"step {step}: the support loss is {float(loss)}; choose a smaller rate")
                # Only these: the backbone and the shared head must not collect gradients.
                loss.backward(inputs=[*moving.values(), *readout.leaves])
                optimizer.step()
        return state | {name: leaf.detach() for name, leaf in moving.items()}

    def leaves(self, unit: Unit, state: State) -> State:
        """Return copies of what gradient steps on a unit move, ready to be differentiated by."""
        return {name: state[name].detach().clone().requires_grad_() for name in self.model.learned_names(unit)}

    @torch.no_grad()
    def hidden(
        self, task: Task, state: State, gates: Mapping[str, float], learners: Sequence[Unit]
    ) -> tuple[str | None, torch.Tensor]:
        """Return the last cut before some units, and the support's activations there."""
        start = self.model.cut_before(learners)
        images = task.support.images
        return start, images if start is None else self.model(images, state, gates, stop=start)

    def gates_of(self, learners: Sequence[Unit]) -> dict[str, float]:
        """Return the gates with all learning units but some closed."""
        kept = {unit.name for unit in learners} | {unit.name for unit in self.model.units if not unit.learns}
        return {name: gate for name, gate in self.gates().items() if name in kept}

    def backward_share(self, units: Sequence[Unit]) -> float:
        """Return what a backward pass to some units costs, as a share of one through the whole backbone."""
        return backward_macs(self.model, units, 1) / (2 * self.model.backbone.macs())
