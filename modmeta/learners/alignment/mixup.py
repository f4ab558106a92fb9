"""Mixup: the model is linear between images of different domains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.data import SourceBatch
from modmeta.errors import refuse_outside
from modmeta.learners.alignment.alignment import Alignment, SourceOutputs, register_alignment


@register_alignment("mixup")
class Mixup(Alignment):
    """Every image is mixed with one of another domain, and so are the labels, in a share that is drawn per batch.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; across domains as in Gulrajani and Lopez-Paz,
    "In Search of Lost Domain Generalization", ICLR 2021. An image keeps at least half of itself. A domain that fills
    more than half of a batch has to mix some of its images with each other.

    Args:
        feature_dim: length of the features.
        domains: number of source domains.
        alpha: both parameters of the share's Beta distribution, above 0; the larger, the more is mixed.
    """

    def __init__(self, feature_dim: int, domains: int, alpha: float = 0.2) -> None:
        super().__init__(feature_dim, domains)
        refuse_outside({"alignment.options.alpha": alpha}, 0, above=True)
        self.alpha = alpha

    def inputs(self, batch: SourceBatch, classes: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return mixed images ``(B, 3, H, W)`` in 0..1 and mixed labels ``(B, C)``."""
        share = float(random.beta(self.alpha, self.alpha))
        share = max(share, 1 - share)
        others = torch.from_numpy(partners(batch.domains.cpu().numpy(), random)).to(batch.domains.device)
        integers = not batch.images.is_floating_point()
        images = batch.images.float() / 255 if integers else batch.images
        labels = F.one_hot(batch.labels, classes).to(images.dtype)
        return torch.lerp(images[others], images, share), torch.lerp(labels[others], labels, share)

    def forward(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the mean risk of the mixed images."""
        return outputs.risks.mean()


def partners(domains: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return for every image another one, of another domain as far as there are any, each taken once.

    Args:
        domains: ``(B,)``.
        random: shuffles images and domains.
    """
    _, places, counts = np.unique(domains, return_inverse=True, return_counts=True)
    order = random.permutation(len(domains))
    order = order[np.argsort(random.permutation(len(counts))[places[order]], kind="stable")]
    # Sorted by domain, a step as long as the largest one leads into another.
    step = int(counts.max()) if len(counts) > 1 else len(domains) // 2
    others = np.empty_like(order)
    others[order] = np.roll(order, -step)
    return others
