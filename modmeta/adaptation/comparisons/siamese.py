"""Siamese networks: how far two images are apart, learned from pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation.comparisons.comparison import Comparison, register_comparison


@register_comparison("siamese")
class Siamese(Comparison):
    """The logit that two images are of one class: a bias minus a weighted L1 distance of their features.

    Koch, Zemel and Salakhutdinov, "Siamese Neural Networks for One-shot Image Recognition", ICML workshop 2015. The
    weights stay positive, and features are standardised per image in place of the paper's sigmoids, which makes one
    scale fit every backbone. A class scores the mean over its support images. Made for the pair loss ``logistic``.

    Args:
        width: number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter(torch.full((width,), math.log(math.expm1(4.0 / width))))
        self.bias = nn.Parameter(torch.tensor(4.0))

    def scores(self, features: Tensor, references: Tensor) -> Tensor:
        """Return the logits of all pairs."""
        weight = F.softplus(self.weight)
        x, y = (weight * F.layer_norm(each, (self.width,)) for each in (features, references))
        return self.bias - (x[:, None] - y).abs().sum(-1)


@register_comparison("nearest")
class Nearest(Comparison):
    """Minus the Euclidean distance of features of unit length; a class scores its nearest support image.

    Made for the pair loss ``contrastive``: Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an
    Invariant Mapping", CVPR 2006.
    """

    distance = True

    def scores(self, features: Tensor, references: Tensor) -> Tensor:
        """Return minus the distances, 0 at best and -2 at worst."""
        gaps = F.normalize(features, dim=-1)[:, None] - F.normalize(references, dim=-1)
        # The root's slope is infinite at 0, where a query is a reference.
        return -gaps.square().sum(-1).add(1e-12).sqrt()

    def pool(self, scores: Tensor, one_hot: Tensor) -> Tensor:
        """Return the score of every class's nearest image."""
        return scores[:, :, None].masked_fill(one_hot == 0, -torch.inf).amax(1)
