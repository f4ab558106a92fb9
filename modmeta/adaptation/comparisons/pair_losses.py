"""Losses on pairs of a query image and a reference, for comparisons."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.registry import Registry

PAIR_LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("pair loss")
"""By name: from scores ``(B, R)`` and whether the pairs are of one class ``(B, R)`` to a scalar."""

register_pair_loss = PAIR_LOSSES.register

MARGIN = 1.0
"""Distance beyond which pairs of different classes count no more, halfway to the largest one on a sphere."""


@register_pair_loss("logistic")
def logistic(scores: Tensor, same: Tensor) -> Tensor:
    """Return the cross-entropy of the pairs' logits: Koch, Zemel and Salakhutdinov 2015."""
    return _balanced(F.binary_cross_entropy_with_logits(scores, same.to(scores.dtype), reduction="none"), same)


@register_pair_loss("contrastive")
def contrastive(scores: Tensor, same: Tensor) -> Tensor:
    """Return the contrastive loss of pairs whose scores are minus distances ``d``.

    ``d^2 / 2`` for one class, ``max(0, margin - d)^2 / 2`` for different ones: Hadsell, Chopra and LeCun 2006.
    """
    apart = F.relu(MARGIN + scores)
    return _balanced(0.5 * torch.where(same, scores, apart).square(), same)


@register_pair_loss("mse")
def mse(scores: Tensor, same: Tensor) -> Tensor:
    """Return the squared error of the sigmoid of the scores: Sung et al. 2018."""
    return F.mse_loss(scores.sigmoid(), same.to(scores.dtype))


def _balanced(losses: Tensor, same: Tensor) -> Tensor:
    """Return the mean over pairs drawn as often from one class as from two."""
    share = same.to(losses.dtype)
    alike, different = (losses * share).sum() / share.sum(), (losses * (1 - share)).sum() / (1 - share).sum()
    return 0.5 * (alike + different)
