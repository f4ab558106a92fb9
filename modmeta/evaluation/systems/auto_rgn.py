"""Auto-RGN: all units, each as fast as its gradient is large relative to the weights that it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from modmeta.adaptation import DivergedError
from modmeta.adapters import State, UnitConfig
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.readout import Readout
from modmeta.evaluation.systems.system import Outcome, Task, register_system
from modmeta.evaluation.systems.unit_system import GradientSystem
from modmeta.learners import MetaLearner


@register_system("auto_rgn")
class AutoRGN(GradientSystem):
    """Adam whose rate is, for each unit and step, its relative gradient norm over the largest one of all units.

    Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR 2023.

    Args:
        units: which adapter modules act where; as a rule ``full``, one layer per unit (``group: site``).
        steps: number of steps on the whole support.
        rate: learning rate of the unit with the largest relative gradient norm.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
    """

    def __init__(
        self,
        units: Sequence[UnitConfig],
        steps: int = 10,
        rate: float = 0.003,
        head: str | None = None,
        head_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__(units, steps, rate, "adam", head, head_options)

    def prepare(self, learner: MetaLearner) -> None:
        """Make sure that every learning unit changes weights to relate its gradient to."""
        super().prepare(learner)
        for unit in self.model.units:
            if unit.learns and not unit.module.overrides("overlay"):
                raise ModmetaError(
                    f"auto_rgn: unit {unit.name!r} changes no weight of the backbone, so its gradient is relative to "
                    f"nothing; leave it out"
                )

    def adapt(self, task: Task) -> Outcome:
        """Take the steps with all gates open."""
        return self.tune(task, self.gates())

    def descend(
        self,
        task: Task,
        state: State,
        gates: Mapping[str, float],
        rates: Mapping[str, float],
        readout: Readout,
        steps: int,
    ) -> State:
        """Return the state after some steps, the rates set anew before each.

        Raises:
            DivergedError: if the loss is not finite.
        """
        learners = [unit for unit in self.model.active(gates) if unit.learns]
        start, hidden = self.hidden(task, state, gates, learners)
        leaves = {unit.name: self.leaves(unit, state) for unit in learners}
        everything = {name: leaf for own in leaves.values() for name, leaf in own.items()}
        optimizer = torch.optim.Adam([{"params": list(own.values())} for own in leaves.values()])
        with torch.enable_grad():
            for step in range(steps):
                now = state | everything
                weights = self.model.overlay(now, gates)
                loss = readout.loss(self.model.backbone.run(hidden, weights, start=start))
                if not torch.isfinite(loss):
                    raise DivergedError(f"step {step}: the support loss is {float(loss)}; choose a smaller rate")
                learned = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
                found = torch.autograd.grad(loss, [*everything.values(), *learned.values()], allow_unused=True)
                for leaf, gradient in zip(everything.values(), found, strict=False):
                    leaf.grad = gradient
                of_weights = dict(zip(learned, found[len(everything) :], strict=True))
                ratios = {
                    unit.name: relative_norm(learned, of_weights, self.model.overlay(now, gates, [unit]))
                    for unit in learners
                }
                largest = max(ratios.values())
                for group, unit in zip(optimizer.param_groups, learners, strict=True):
                    group["lr"] = rates[unit.name] * ratios[unit.name] / max(largest, 1e-12)
                optimizer.step()
        return state | {name: leaf.detach() for name, leaf in everything.items()}


def relative_norm(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], names: Iterable[str]) -> float:
    """Return the norm of the gradient of some weights over the norm of these weights."""
    found = [(weights[name], gradients[name]) for name in names]
    size = sum(float(weight.detach().square().sum()) for weight, _ in found) ** 0.5
    slope = sum(float(gradient.square().sum()) for _, gradient in found if gradient is not None) ** 0.5
    return slope / max(size, 1e-8)
