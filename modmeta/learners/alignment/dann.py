"""DANN: no network can tell the domains apart by their features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.errors import refuse_outside
from modmeta.learners.alignment.alignment import Penalty, SourceOutputs, register_alignment


@register_alignment("dann")
class Dann(Penalty):
    """A classifier learns to tell the domains apart, and its gradient reaches the backbone with the opposite sign.

    Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016. The reversed gradient grows from 0 to its
    full size as ``2 / (1 + exp(-10 p)) - 1`` over the progress ``p``.

    Args:
        feature_dim: length of the features.
        domains: number of source domains.
        weight: factor on the domain classifier's loss, 0 or more.
        width: width of its two hidden layers, above 0.
    """

    def __init__(self, feature_dim: int, domains: int, weight: float = 1.0, width: int = 256) -> None:
        super().__init__(feature_dim, domains, weight)
        refuse_outside({"alignment.options.width": width}, 1)
        self.classifier = nn.Sequential(
            nn.Linear(feature_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, domains)
        )

    def penalty(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the cross-entropy of the domains."""
        size = 2 / (1 + math.exp(-10 * progress)) - 1
        features: Tensor = _Reversed.apply(outputs.features, size)
        return F.cross_entropy(self.classifier(features), outputs.domains)


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None
