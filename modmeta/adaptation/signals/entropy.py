"""Entropy: predictions are sure of themselves."""

from __future__ import annotations

from torch import Tensor

from modmeta.adaptation.signals.signal import Seen, Signal, register_signal


@register_signal("entropy")
class Entropy(Signal):
    """Mean entropy of the predictions.

    Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021. Naming one class for all
    images is its global minimum; few images, uneven classes, many steps and large rates lead there: Niu et al.,
    "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023.
    """

    def loss(self, seen: Seen) -> Tensor:
        """Return the mean entropy, in nats."""
        return entropies(seen.logits.softmax(-1)).mean()


def entropies(p: Tensor) -> Tensor:
    """Return the entropies of distributions along the last axis, in nats."""
    return -(p * p.clamp_min(1e-12).log()).sum(-1)
