"""FLUTE: a new domain starts from a blend of what the source domains' own modules are."""

from __future__ import annotations

import torch

from modmeta.adapters import AdaptedBackbone, State
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.system import Outcome, Task, register_system
from modmeta.evaluation.systems.unit_system import GradientSystem, Optimizer
from modmeta.learners import MetaLearner


@register_system("flute")
class Flute(GradientSystem):
    """A convex blend of the bank's specialists by how near their domains are, and a few steps from there.

    Triantafillou et al., "Learning a Universal Template for Few-shot Dataset Generalization", ICML 2021. The units
    are those of the checkpoint (``film`` as a rule); the weights come from distances of mean features rather
    than from a trained classifier of domains, and add up to 1 over the specialists that the episode may see.

    Args:
        steps: number of steps on the whole support.
        rate: learning rate.
        optimizer: ``rms``, ``adam``, ``sgd`` or ``adadelta``.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
    """

    def __init__(
        self,
        steps: int = 6,
        rate: float = 0.003,
        optimizer: Optimizer = "adam",
        head: str | None = None,
        head_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__((), steps, rate, optimizer, head, head_options)

    def build_model(self, learner: MetaLearner) -> AdaptedBackbone:
        """Return the learner's own model, whose units the bank has specialists of.

        Raises:
            ModmetaError: if it has none.
        """
        if not learner.bank.visible():
            raise ModmetaError(
                "flute: the checkpoint's bank holds no specialist of a source domain to blend; "
                "add one per domain with bank.add(domain, state, mean) or leave flute out"
            )
        return learner.model

    def initial(self, task: Task) -> State:
        """Return the blend for a task; no specialist of its own domain takes part."""
        bank = self.learner.bank
        domains = bank.visible(task.support.hidden)
        if not domains:
            raise ModmetaError("flute: the bank holds no specialist but that of the episode's own domain; add others")
        means = torch.stack([bank.means[domain] for domain in domains])
        sources = task.sources
        distances = sources.distances(task.features.mean(0), len(task.support.images), means)
        # As sharp as the sources' own posterior, without its "none of them".
        weights = (-4.0 * distances / sources.typical).softmax(0)
        weights = torch.cat([weights.new_zeros(1), weights])
        blended = {name: tensor.detach() for name, tensor in bank.initial().items()}
        for unit in self.model.units:
            blended |= {name: tensor.detach() for name, tensor in bank.blend(unit, domains, weights).items()}
        return blended

    def adapt(self, task: Task) -> Outcome:
        """Blend, then take the steps on all units that learn, and leave statistics alone."""
        return self.tune(task, {unit.name: 1.0 for unit in self.model.units if unit.learns})
