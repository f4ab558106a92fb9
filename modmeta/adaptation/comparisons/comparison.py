"""The contract of a comparison: scores of query features against references, and logits from them.

Unlike a head, a comparison is no linear classifier of features: it may be a kernel or a small network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.errors import ModmetaError
from modmeta.registry import Registry

COMPARISONS: Registry[Callable[..., Comparison]] = Registry("comparison")
register_comparison = COMPARISONS.register


@dataclass(frozen=True)
class Compared:
    """What a comparison remembers of a support set; called with features, it gives logits.

    Attributes:
        comparison: scores queries against the references.
        references: ``(R, D)``, support images or class means.
        labels: ``(R,)`` their classes.
        ways: number of classes.
    """

    comparison: Comparison
    references: Tensor
    labels: Tensor
    ways: int

    def scores(self, features: Tensor) -> Tensor:
        """Return how alike features ``(B, D)`` and references are ``(B, R)``; larger is more alike."""
        return self.comparison.scores(features, self.references)

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of features ``(B, D)``."""
        one_hot = F.one_hot(self.labels, self.ways).to(features.dtype)
        return self.comparison.pool(self.scores(features), one_hot)


class Comparison(nn.Module, ABC):
    """Base of the comparisons; a subclass implements :meth:`scores`, and :meth:`pool` where the mean will not do.

    Args:
        width: number of features ``D``.
    """

    averages: ClassVar[bool] = False
    """Whether the references are class means instead of the support images themselves."""

    distance: ClassVar[bool] = False
    """Whether minus a score is a distance, as a contrastive loss needs it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def fit(self, features: Tensor, labels: Tensor, ways: int) -> Compared:
        """Return what is to be remembered of a support set.

        Args:
            features: ``(S, D)``.
            labels: ``(S,)`` in ``0..ways-1``.
            ways: number of classes.

        Raises:
            ModmetaError: if a class has no image.
        """
        counts = torch.bincount(labels, minlength=ways)
        if not bool((counts > 0).all()):
            raise ModmetaError(f"class number {int(counts.argmin())} of the support has no image; give one or more")
        if not self.averages:
            return Compared(self, features, labels, ways)
        one_hot = F.one_hot(labels, ways).to(features.dtype)
        means = one_hot.T @ features / counts[:, None]
        return Compared(self, means, torch.arange(ways, device=labels.device), ways)

    @abstractmethod
    def scores(self, features: Tensor, references: Tensor) -> Tensor:
        """Return how alike features ``(B, D)`` and references ``(R, D)`` are, ``(B, R)``."""

    def pool(self, scores: Tensor, one_hot: Tensor) -> Tensor:
        """Return logits ``(B, C)`` from scores ``(B, R)`` and the references' classes ``(R, C)``: class means."""
        return scores @ one_hot / one_hot.sum(0)
