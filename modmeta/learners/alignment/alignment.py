"""The contract of an alignment: what source training minimises in place of the mean risk, so that domains agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.data import SourceBatch
from modmeta.errors import refuse_outside
from modmeta.registry import Registry

ALIGNMENTS: Registry[Callable[..., Alignment]] = Registry("alignment")
register_alignment = ALIGNMENTS.register


@dataclass(frozen=True)
class AlignmentConfig:
    """Which alignment source training uses.

    Attributes:
        name: registered name, such as ``coral``.
        options: the alignment's own options, such as ``{"weight": 0.5}``.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ALIGNMENTS.get(self.name)

    def build(self, feature_dim: int, domains: int) -> Alignment:
        """Create the alignment for features of a length and a number of source domains."""
        made: Alignment = ALIGNMENTS.make(self.name, feature_dim, domains, **self.options)
        return made


@dataclass(frozen=True)
class SourceOutputs:
    """What the model made of a batch of source images.

    Attributes:
        features: ``(B, D)``.
        logits: ``(B, C)``.
        targets: labels ``(B,)``, or shares of the classes ``(B, C)``.
        domains: ``(B,)`` in ``0..domains-1``; which of them a batch holds is left to chance.
        label_smoothing: share of the target that is spread over all classes.
    """

    features: Tensor
    logits: Tensor
    targets: Tensor
    domains: Tensor
    label_smoothing: float = 0.0

    @property
    def risks(self) -> Tensor:
        """Cross-entropy of every image ``(B,)``, in nats."""
        return F.cross_entropy(self.logits, self.targets, reduction="none", label_smoothing=self.label_smoothing)

    @property
    def shares(self) -> Tensor:
        """Targets as shares of the classes ``(B, C)``, smoothed."""
        classes = self.logits.shape[1]
        hard = self.targets.ndim == 1
        shares = (F.one_hot(self.targets, classes) if hard else self.targets).to(self.logits.dtype)
        return (1 - self.label_smoothing) * shares + self.label_smoothing / classes

    def domain_means(self, values: Tensor) -> Tensor:
        """Return the means of values ``(B, ...)`` over the ``G`` domains that the batch holds, ``(G, ...)``."""
        return torch.stack([values[rows].mean(0) for rows in self.rows()])

    def rows(self, least: int = 1) -> list[Tensor]:
        """Return the rows of every domain that has at least so many images in the batch."""
        found = [(self.domains == domain).nonzero().flatten() for domain in self.domains.unique()]
        return [rows for rows in found if len(rows) >= least]


class Alignment(nn.Module, ABC):
    """Base of the alignments; a subclass implements :meth:`forward`, and :meth:`inputs` where it changes the images.

    Args:
        feature_dim: length ``D`` of the features.
        domains: number of source domains.
    """

    def __init__(self, feature_dim: int, domains: int) -> None:
        super().__init__()

    def inputs(self, batch: SourceBatch, classes: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the images to train on and their targets, labels ``(B,)`` or shares of the classes ``(B, C)``.

        Args:
            batch: the images as they were drawn.
            classes: number of classes.
            random: the only source of randomness; it is a function of the step, so that a resumed run draws the same.
        """
        return batch.images, batch.labels

    @abstractmethod
    def forward(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the scalar to minimise.

        Args:
            outputs: what the model made of a batch.
            progress: share of source training that is done, in 0..1.
        """


class Penalty(Alignment):
    """Base of the alignments that add a penalty to the mean risk.

    Args:
        feature_dim: length ``D`` of the features.
        domains: number of source domains.
        weight: factor on the penalty, 0 or more; with 0 this is empirical risk minimisation.
        anneal: share of source training in 0..1 during which the weight is 1 at most.
    """

    def __init__(self, feature_dim: int, domains: int, weight: float = 1.0, anneal: float = 0.0) -> None:
        super().__init__(feature_dim, domains)
        refuse_outside({"alignment.options.weight": weight}, 0)
        refuse_outside({"alignment.options.anneal": anneal}, 0, 1)
        self.weight = weight
        self.anneal = anneal

    def forward(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the mean risk plus the weighted penalty."""
        weight = min(1.0, self.weight) if progress < self.anneal else self.weight
        return outputs.risks.mean() + weight * self.penalty(outputs, progress)

    @abstractmethod
    def penalty(self, outputs: SourceOutputs, progress: float) -> Tensor:
        """Return the penalty, a scalar; 0 where the batch holds too few domains to compare.

        Args:
            outputs: what the model made of a batch.
            progress: share of source training that is done, in 0..1.
        """
