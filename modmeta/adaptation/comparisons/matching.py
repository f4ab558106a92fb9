"""Matching networks: attention over the support images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation.comparisons.comparison import Comparison, register_comparison
from modmeta.errors import ModmetaError


@register_comparison("matching")
class Matching(Comparison):
    """A query's label is a mixture of the support's labels, weighted by a softmax over cosine similarities.

    Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016, without full context embeddings. The
    paper's similarities have no factor; with one that is learned the attention can be sharp.

    Args:
        width: number of features.
        scale: initial factor on the similarities, above 0; 1 is the paper's.
    """

    def __init__(self, width: int, scale: float = 10.0) -> None:
        super().__init__(width)
        if scale <= 0:
            raise ModmetaError(f"comparison_options: scale must be above 0, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def scores(self, features: Tensor, references: Tensor) -> Tensor:
        """Return cosine similarities times the factor."""
        return self.log_scale.exp() * F.normalize(features, dim=-1) @ F.normalize(references, dim=-1).T

    def pool(self, scores: Tensor, one_hot: Tensor) -> Tensor:
        """Return log probabilities: the logarithm of the attention that each class gets."""
        by_class = scores[:, :, None].masked_fill(one_hot == 0, -torch.inf).logsumexp(1)
        return by_class - scores.logsumexp(1, keepdim=True)
