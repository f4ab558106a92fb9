"""Comparisons of a query image with a support set, for metric learners."""

from modmeta.adaptation.comparisons import matching, relation, siamese  # noqa: F401 - they register themselves
from modmeta.adaptation.comparisons.comparison import COMPARISONS, Compared, Comparison, register_comparison
from modmeta.adaptation.comparisons.pair_losses import PAIR_LOSSES, register_pair_loss

__all__ = [
    "COMPARISONS",
    "PAIR_LOSSES",
    "Compared",
    "Comparison",
    "register_comparison",
    "register_pair_loss",
]
