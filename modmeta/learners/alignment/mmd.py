"""MMD: no smooth function tells the features of one domain from those of another on average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modmeta.errors import ModmetaError, refuse_outside
from modmeta.learners.alignment.alignment import Penalty, SourceOutputs, register_alignment

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


@register_alignment("mmd")
class Mmd(Penalty):
    """Squared maximum mean discrepancy, averaged over the pairs of domains.

    Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, the biased estimate, which is 0 for equal samples and never
    negative; Li et al., "Domain Generalization with Adversarial Feature Learning", CVPR 2018. The kernel is the sum of
    the Gaussians ``exp(-gamma |x - y|^2)``, of standard deviations from 22 down to 0.02 in the features' unit, as in
    Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021.

    Args:
        feature_dim: length of the features.
        domains: number of source domains.
        weight: factor on the penalty, 0 or more.
        anneal: share of source training in 0..1 during which the weight is 1 at most.
        gammas: inverse squared widths of the Gaussians, above 0.
    """

    def __init__(
        self,
        feature_dim: int,
        domains: int,
        weight: float = 1.0,
        anneal: float = 0.0,
        gammas: Sequence[float] = GAMMAS,
    ) -> None:
        super().__init__(feature_dim, domains, weight, anneal)
        if not gammas:
            raise ModmetaError("alignment.options.gammas is empty; name the width of one Gaussian or more")
        refuse_outside({f"alignment.options.gammas[{i}]": gamma for i, gamma in enumerate(gammas)}, 0, above=True)
        self.gammas = tuple(gammas)

    def penalty(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the mean of ``E k(x, x') + E k(y, y') - 2 E k(x, y)``."""
        x = outputs.features
        squares = x.square().sum(1)
        distances = (squares[:, None] + squares - 2 * x @ x.T).clamp_min(0)
        kernel = torch.stack([(-gamma * distances).exp() for gamma in self.gammas]).sum(0)
        means = outputs.domain_means(outputs.domain_means(kernel).T)
        gaps = means.diagonal()[:, None] + means.diagonal() - 2 * means
        pairs = len(gaps) * (len(gaps) - 1)
        return gaps.sum() / pairs if pairs else x.new_zeros(())
