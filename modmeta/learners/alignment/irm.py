"""IRM: one classifier is optimal in every domain at once."""

from __future__ import annotations

from torch import Tensor

from modmeta.learners.alignment.alignment import Penalty, SourceOutputs, register_alignment


@register_alignment("irm")
class Irm(Penalty):
    """Squared slope of each domain's risk in a common factor on the logits, at 1, averaged over the domains.

    Arjovsky et al., "Invariant Risk Minimization", arXiv:1907.02893, 2019: IRMv1. The slope of cross-entropy is known
    in closed form: ``E[(softmax(z) - y) . z]``.

    Args:
        feature_dim: length of the features.
        domains: number of source domains.
        weight: factor on the penalty, 0 or more. The published 100 is for thousands of steps: in a short fit, logits
            near 0 please it before the risk counts, so take less there.
        anneal: share of source training in 0..1 during which the weight is 1 at most: before there are features
            worth keeping, a heavy penalty makes all logits 0.
    """

    def __init__(self, feature_dim: int, domains: int, weight: float = 100.0, anneal: float = 0.1) -> None:
        super().__init__(feature_dim, domains, weight, anneal)

    def penalty(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the mean squared slope."""
        slopes = ((outputs.logits.softmax(-1) - outputs.shares) * outputs.logits).sum(-1)
        return outputs.domain_means(slopes).square().mean()
