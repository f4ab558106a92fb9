"""CORAL: the features of all domains have the same mean and covariance."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from modmeta.learners.alignment.alignment import Penalty, SourceOutputs, register_alignment


@register_alignment("coral")
class Coral(Penalty):
    """Squared differences of means and covariances, averaged over their entries and over the pairs of domains.

    Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", ECCV Workshops 2016; with the
    means, and for many domains, as in Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021.
    A domain with a single image in the batch has no covariance and is left out.
    """

    def penalty(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the mean squared difference."""
        moments = [_moments(outputs.features[rows]) for rows in outputs.rows(least=2)]
        gaps = [
            (mean - other_mean).square().mean() + (covariance - other).square().mean()
            for (mean, covariance), (other_mean, other) in combinations(moments, 2)
        ]
        return torch.stack(gaps).mean() if gaps else outputs.features.new_zeros(())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)
