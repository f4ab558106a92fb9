"""Information maximisation: every prediction is sure of itself, and all together name all classes."""

from __future__ import annotations

from torch import Tensor

from modmeta.adaptation.signals.entropy import entropies
from modmeta.adaptation.signals.signal import Seen, Signal, register_signal
from modmeta.errors import refuse_outside


@register_signal("information_maximisation")
class InformationMaximisation(Signal):
    """Mean entropy of the predictions less the entropy of their mean: minus the information between image and class.

    Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
    Adaptation", ICML 2020, without its pseudo-labels. Naming one class for all images gains nothing here, but where the
    images are of few classes it spreads them over all.

    Args:
        diversity: weight of the entropy of the mean prediction, 0 or more.
    """

    def __init__(self, diversity: float = 1.0) -> None:
        refuse_outside({"signals: diversity": diversity}, 0)
        self.diversity = diversity

    def loss(self, seen: Seen) -> Tensor:
        """Return the difference, in nats."""
        return information_loss(seen.logits, self.diversity)


def information_loss(logits: Tensor, diversity: float) -> Tensor:
    """Return the mean entropy of the predictions less ``diversity`` times that of their mean, a scalar.

    Args:
        logits: ``(S, C)``.
        diversity: weight of the entropy of the mean prediction.
    """
    p = logits.softmax(-1)
    return entropies(p).mean() - diversity * entropies(p.mean(0))
