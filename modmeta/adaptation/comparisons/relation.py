"""Relation networks: a learned measure of how alike an image and a class are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation.comparisons.comparison import Comparison, register_comparison
from modmeta.errors import ModmetaError


@register_comparison("relation")
class Relation(Comparison):
    """A small network on the features of a query and of a class, side by side.

    Sung et al., "Learning to Compare: Relation Network for Few-Shot Learning", CVPR 2018. The paper's
    module reads feature maps; this one reads pooled features, which every backbone has, transformers included. Class
    features are means where the paper adds them up, so that one module serves any number of shots. Made for the pair
    loss ``mse``.

    Args:
        width: number of features.
        hidden: width of the module's two hidden layers.
    """

    averages = True

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__(width)
        if hidden < 1:
            raise ModmetaError(f"comparison_options: hidden must be 1 or more, got {hidden}")
        self.network = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def scores(self, features: Tensor, references: Tensor) -> Tensor:
        """Return the relation of all pairs, before the sigmoid."""
        x, y = (F.layer_norm(each, (self.width,)) for each in (features, references))
        shape = (len(x), len(y), self.width)
        pairs = torch.cat([x[:, None].expand(shape), y.expand(shape)], dim=-1)
        scores: Tensor = self.network(pairs)[..., 0]
        return scores
