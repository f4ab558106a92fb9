"""TinyTrain: the layers whose Fisher information is largest for what updating them costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modmeta.adaptation import backward_macs
from modmeta.adapters import Unit, UnitConfig
from modmeta.backbone import Site
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.readout import Readout
from modmeta.evaluation.systems.system import Outcome, Task, register_system
from modmeta.evaluation.systems.unit_system import GradientSystem, Optimizer
from modmeta.learners import MetaLearner


@register_system("tiny_train")
class TinyTrain(GradientSystem):
    """Updates the units with the most Fisher potential per parameter and multiply-accumulate, within two budgets.

    Kwon et al., "TinyTrain: Resource-Aware Task-Adaptive Sparse Training of DNNs at the Data-Scarce Edge", ICML 2024.
    Whole layers are chosen here, without its further choice of channels.

    Args:
        units: which adapter modules act where; as a rule ``full`` on convolutions, one layer per unit
            (``group: site``).
        budget: share of the whole network's backward multiply-accumulates that a step may take.
        parameters: share of the network's parameters that may be updated.
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
        parameters: float = 0.15,
        steps: int = 10,
        rate: float = 0.003,
        optimizer: Optimizer = "adam",
        head: str | None = None,
        head_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__(units, steps, rate, optimizer, head, head_options)
        self.budget = budget
        self.parameters = parameters

    def prepare(self, learner: MetaLearner) -> None:
        """Make sure that every learning unit has multiply-accumulates to set its information against."""
        super().prepare(learner)
        for unit in self.model.units:
            if unit.learns and not (_macs(unit) and all(site.called for site in unit.sites)):
                raise ModmetaError(
                    f"tiny_train: unit {unit.name!r} holds a layer without multiply-accumulates or one that is never "
                    f"called; choose convolutions or linear layers by kinds and names"
                )

    def adapt(self, task: Task) -> Outcome:
        """Choose the units by one backward pass, and take the steps on them."""
        if not self.learns_from(task):
            return self.tune(task, {})
        learners = [unit for unit in self.model.units if unit.learns]
        potentials = self.potentials(task, learners)
        spent = backward_macs(self.model, learners, len(task.support.images))
        return self.tune(task, self.gates_of(self.chosen(learners, potentials)), before=spent)

    def potentials(self, task: Task, learners: Sequence[Unit]) -> list[float]:
        """Return the Fisher potential of every unit: that of the outputs of its layers, summed."""
        start, hidden = self.hidden(task, {}, {}, learners)
        by_site = fisher_potentials(self, hidden, start, self.readout(task), [s for u in learners for s in u.sites])
        return [sum(by_site[site.name] for site in unit.sites) for unit in learners]

    def chosen(self, learners: Sequence[Unit], potentials: Sequence[float]) -> list[Unit]:
        """Return the units to update: in the order of their score, each that both budgets still have room for."""
        most_parameters = max(unit.cost.parameters for unit in learners)
        most_macs = max(_macs(unit) for unit in learners)
        scores = {
            unit.name: potential / (unit.cost.parameters / most_parameters * _macs(unit) / most_macs)
            for unit, potential in zip(learners, potentials, strict=True)
        }
        whole = sum(parameter.numel() for parameter in self.model.backbone.parameters())
        found: list[Unit] = []
        for unit in sorted(learners, key=lambda unit: -scores[unit.name]):
            more = [*found, unit]
            if (
                sum(each.cost.parameters for each in more) <= self.parameters * whole
                and self.backward_share(more) <= self.budget
            ):
                found = more
        return found


def fisher_potentials(
    system: TinyTrain, hidden: Tensor, start: str | None, readout: Readout, sites: Sequence[Site]
) -> dict[str, float]:
    """Return by site the Fisher information of its output: ``1/(2N) sum_channels sum_images (sum_places a g)^2``.

    Args:
        system: gives the backbone.
        hidden: activations at ``start``.
        start: a cut before all sites.
        readout: gives the loss.
        sites: the layers.
    """
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, y: Tensor) -> Tensor:
        # The gradient of a zero that is added is that of the output; the layers stay connected.
        outputs[name] = (y.detach(), torch.zeros_like(y, requires_grad=True))
        return y + outputs[name][1]

    slots = {site.name: (lambda x, y, run, name=site.name: watch(name, y)) for site in sites}
    with torch.enable_grad():
        loss = readout.loss(system.model.backbone.run(hidden, start=start, slots=slots))
        gradients = torch.autograd.grad(loss, [zero for _, zero in outputs.values()])
    found = {}
    for site, gradient in zip(sites, gradients, strict=True):
        product = (outputs[site.name][0] * gradient).movedim(site.channel_dim, 1).flatten(2).sum(2)
        found[site.name] = float(product.square().sum()) / (2 * len(product))
    return found


def _macs(unit: Unit) -> int:
    return sum(site.macs for site in unit.sites)
