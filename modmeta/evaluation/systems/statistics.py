"""Recalibrated normalisation: forward passes over the support, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modmeta.adaptation import observe_norms, read_statistics
from modmeta.adapters import UnitConfig
from modmeta.backbone import Backbone, Site
from modmeta.errors import ModmetaError
from modmeta.evaluation.systems.readout import ClosedForm
from modmeta.evaluation.systems.system import Outcome, Task, register_system
from modmeta.evaluation.systems.unit_system import UnitSystem
from modmeta.learners import MetaLearner


@register_system("statistics")
class Statistics(UnitSystem):
    """Normalisation statistics blended from the layers' own to the support's, by the same share everywhere.

    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020.

    Args:
        gate: share of the support's statistics, in 0..1.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
    """

    def __init__(
        self, gate: float = 0.3, head: str | None = None, head_options: dict[str, float] | None = None
    ) -> None:
        super().__init__([UnitConfig("norm_blend", group="all", gate=gate)], head, head_options)

    def adapt(self, task: Task) -> Outcome:
        """Read the support's statistics and fit the head."""
        gates = self.gates()
        state = read_statistics(self.model, self.initial(task), self.plan(gates, {}, 0), task.support.images)
        return self.outcome(task, state, gates, ClosedForm(task, self.head))


@register_system("hand_rule")
class HandRule(Statistics):
    """The rule of two lines: blend the statistics if the first normalisation layers see a shift, else nothing.

    Args:
        gate: share of the support's statistics where there is a shift.
        threshold: shift above which they are blended.
        early: share of the normalisation layers, from the first one, that the shift is measured at.
        head: registered name of a head; None takes the learner's own.
        head_options: options of the head.
    """

    def __init__(
        self,
        gate: float = 0.3,
        threshold: float = 0.15,
        early: float = 0.2,
        head: str | None = None,
        head_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__(gate, head, head_options)
        if not 0 < early <= 1:
            raise ModmetaError(f"early must lie above 0 and at most at 1, got {early}")
        self.threshold = threshold
        self.early = early

    def prepare(self, learner: MetaLearner) -> None:
        """Find the first normalisation layers."""
        super().prepare(learner)
        (unit,) = self.model.units
        self.sites = unit.sites[: max(1, round(self.early * len(unit.sites)))]

    def adapt(self, task: Task) -> Outcome:
        """Measure the shift, and blend or not."""
        if float(norm_shift(self.model.backbone, self.sites, task.support.images)) > self.threshold:
            return super().adapt(task)
        return self.outcome(task, {}, {}, ClosedForm(task, self.head))


def norm_shift(backbone: Backbone, sites: Sequence[Site], images: Tensor) -> Tensor:
    """Return the mean shift of some layers' inputs against their running statistics, a scalar.

    Of a channel it is the squared difference of the means plus that of the deviations, in units of the layer's own
    deviation; every layer weighs the same, however many channels it has.

    Args:
        backbone: the frozen backbone.
        sites: normalisation layers with running statistics.
        images: ``(S, 3, H, W)``.
    """
    _, mean, variance = observe_norms(backbone, images, sites)
    tensors = backbone.tensors()
    own_mean = torch.cat([tensors[f"{site.name}.running_mean"] for site in sites])
    own_deviation = torch.cat([tensors[f"{site.name}.running_var"] for site in sites]).clamp_min(1e-6).sqrt()
    shift = ((mean - own_mean) / own_deviation).square() + (variance.sqrt() / own_deviation - 1).square()
    return torch.stack([of_site.mean() for of_site in shift.split([site.channels for site in sites])]).mean()
