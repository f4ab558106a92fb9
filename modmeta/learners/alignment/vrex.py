"""V-REx: all domains have the same risk."""

from __future__ import annotations

from torch import Tensor

from modmeta.learners.alignment.alignment import Penalty, SourceOutputs, register_alignment


@register_alignment("vrex")
class VRex(Penalty):
    """Variance of the domains' risks.

    Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation (REx)", ICML 2021.

    Args:
        feature_dim: length of the features.
        domains: number of source domains.
        weight: factor on the penalty, 0 or more.
        anneal: share of source training in 0..1 during which the weight is 1 at most.
    """

    def __init__(self, feature_dim: int, domains: int, weight: float = 10.0, anneal: float = 0.1) -> None:
        super().__init__(feature_dim, domains, weight, anneal)

    def penalty(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the variance."""
        return outputs.domain_means(outputs.risks).var(correction=0)
