"""The contract of a signal: an inner loss that needs no labels, and mixtures of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modmeta.errors import refuse_outside
from modmeta.registry import Registry

SIGNALS: Registry[Callable[..., Signal]] = Registry("signal")
register_signal = SIGNALS.register


@dataclass(frozen=True)
class SignalConfig:
    """Which signal an adaptation descends, beside the labels' loss where there are labels.

    Attributes:
        name: registered name, such as ``entropy``.
        weight: factor on it, above 0; the labels' loss has 1.
        options: the signal's own options, such as ``{"diversity": 0.5}``.
    """

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SIGNALS.get(self.name)
        refuse_outside({f"signals: weight of {self.name!r}": self.weight}, 0, above=True)


@dataclass(frozen=True)
class Seen:
    """What a signal sees of a support set under the units as they are at a step.

    Attributes:
        features: ``(S, D)`` of the images.
        views: ``(K, S, D)`` of their views.
        logits: ``(S, C)`` of the images; where there are labels, each by a head that was fitted without the image.
        classify: from features ``(B, D)`` to logits ``(B, C)``, by the sources' classifier, re-centred on the images,
            or by the head that is fitted to all labelled ones.
    """

    features: Tensor
    views: Tensor
    logits: Tensor
    classify: Callable[[Tensor], Tensor]


class Signal(ABC):
    """Base of the signals; a subclass implements :meth:`loss`, and :meth:`views` where it compares images with others.

    A signal draws nothing at random, so the same images are adapted to in the same way. The views are made before the
    first step and go through the backbone along with the images: what lies before the units is computed once. A
    backbone whose normalisation reads the batch takes images and views for one batch.
    """

    count = 0
    """Number ``K`` of views of each image."""

    def views(self, images: Tensor) -> list[Tensor]:
        """Return the ``K`` changed versions of images ``(S, 3, H, W)`` whose features the loss needs."""
        return []

    @abstractmethod
    def loss(self, seen: Seen) -> Tensor:
        """Return the scalar to descend, differentiable in the features of images and views."""


class SignalMixture:
    """A weighted sum of signals.

    Args:
        configs: which; none of them makes a mixture that is false.
    """

    def __init__(self, configs: Sequence[SignalConfig]) -> None:
        self._parts: list[tuple[float, Signal]] = [
            (config.weight, SIGNALS.make(config.name, **config.options)) for config in configs
        ]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def images(self, images: Tensor) -> Tensor:
        """Return images ``(S, 3, H, W)`` with all their views behind them, ``((1 + K) S, 3, H, W)``."""
        return torch.cat([images, *(view for _, signal in self._parts for view in signal.views(images))])

    def loss(self, features: Tensor, logits: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the weighted sum, a scalar.

        Args:
            features: ``((1 + K) S, D)`` of what :meth:`images` gave.
            logits: as :class:`Seen` has them.
            classify: as :class:`Seen` has it.
        """
        counts = [signal.count for _, signal in self._parts]
        own, *views = features.unflatten(0, (1 + sum(counts), -1)).split([1, *counts])
        return torch.stack(
            [
                weight * signal.loss(Seen(own[0], view, logits, classify))
                for (weight, signal), view in zip(self._parts, views, strict=True)
            ]
        ).sum()
