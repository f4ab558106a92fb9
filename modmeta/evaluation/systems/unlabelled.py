"""Adaptation to images without labels, by the predictions of the source classifier."""

from __future__ import annotations

from collections.abc import Sequence

from modmeta.adapters import UnitConfig
from modmeta.evaluation.systems.readout import Readout, SourceEntropy
from modmeta.evaluation.systems.system import Outcome, Task, register_system
from modmeta.evaluation.systems.unit_system import GradientSystem, Optimizer


class _Entropy(GradientSystem):
    """Gradient steps on the entropy of the source classifier's predictions; labels are not looked at.

    Args:
        units: which adapter modules act where.
        steps: number of steps on the whole support.
        rate: learning rate.
        optimizer: ``rms``, ``adam``, ``sgd`` or ``adadelta``.
        aligned: whether the source classifier is re-centred on the support's mean feature.
    """

    diversity = 0.0
    """Weight of the entropy of the mean prediction."""

    def __init__(
        self,
        units: Sequence[UnitConfig],
        steps: int = 10,
        rate: float = 0.001,
        optimizer: Optimizer = "adam",
        aligned: bool = False,
    ) -> None:
        super().__init__(units, steps, rate, optimizer)
        self.aligned = aligned

    def readout(self, task: Task) -> Readout:
        """Return the source classifier."""
        return SourceEntropy(task, self.diversity, self.aligned)

    def learns_from(self, task: Task) -> bool:
        """Whatever the images, they can be predicted."""
        return True

    def adapt(self, task: Task) -> Outcome:
        """Take the steps with all gates open."""
        return self.tune(task, self.gates())


@register_system("tent")
class Tent(_Entropy):
    """Entropy minimisation of normalisation layers, whose statistics are first read off the support.

    Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021. Its units are ``norm_blend``
    with gate 1 and ``film``; the statistics stay those of the first pass.
    """


@register_system("shot_im")
class InformationMaximisation(_Entropy):
    """Information maximisation: confident predictions, of all classes alike.

    Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
    Adaptation", ICML 2020, without its pseudo-labels.
    """

    diversity = 1.0
