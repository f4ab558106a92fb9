"""Closed-form heads: from labelled features to a classifier, in one differentiable step.

Every head has the same two verbs. ``fit`` makes a classifier of the support. ``held_out`` gives, for every
support image, logits of a classifier that did not see it, which is what an inner loop may learn from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.errors import refuse_outside
from modmeta.registry import Registry

HEADS: Registry[Callable[..., Head]] = Registry("head")
register_head = HEADS.register


@dataclass(frozen=True)
class Classifier:
    """A fitted head: plain tensors, linear in features that may be centred and normalised first.

    Attributes:
        weight: ``(D, C)``.
        bias: ``(C,)``.
        center: ``(D,)``, subtracted from features.
        scale: factor on the logits, a scalar.
        normalize: whether centred features are scaled to unit length.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    scale: Tensor
    normalize: bool

    def weighted(self, share: float) -> Classifier:
        """Return the classifier whose logits are this share of its own."""
        return replace(self, scale=share * self.scale)

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of features ``(B, D)``."""
        x = features - self.center
        if self.normalize:
            x = F.normalize(x, dim=-1)
        return self.scale * (x @ self.weight + self.bias)


@dataclass(frozen=True)
class Anchor:
    """The source domains' own classifier, for the classes of one episode.

    Attributes:
        weight: ``(D, C)`` on centred features of unit length; zero for classes that no source knows.
        known: ``(C,)`` bool, the classes that the sources know.
        center: ``(D,)`` mean feature of the sources.
        offset: ``(C,)`` added to the scores of known classes; None is 0.
    """

    weight: Tensor
    known: Tensor
    center: Tensor
    offset: Tensor | None = None

    @property
    def bias(self) -> Tensor:
        """``(C,)``, added to the scores of known classes."""
        return self.weight.new_zeros(self.weight.shape[1]) if self.offset is None else self.offset

    def classifier(self, scale: Tensor, center: Tensor | None = None) -> Classifier:
        """Return the source classifier as it is, or re-centred on a new domain's mean feature."""
        bias = self.bias.masked_fill(~self.known, -1.0)
        return Classifier(self.weight, bias, self.center if center is None else center, scale, True)


@dataclass(frozen=True)
class Labelled:
    """What a head is fitted to.

    Attributes:
        features: ``(S, D)``.
        labels: ``(S,)`` in ``0..ways-1``.
        ways: number of classes.
        anchor: the sources' classifier for these classes, if there is one.
        ridge: factor on the head's ridge strength, a scalar; None is 1.
    """

    features: Tensor
    labels: Tensor
    ways: int
    anchor: Anchor | None
    ridge: Tensor | None

    @property
    def one_hot(self) -> Tensor:
        """``(S, C)``, 1 at each image's class."""
        return F.one_hot(self.labels, self.ways).to(self.features.dtype)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return features of unit length around the mean of the class means, and that centre ``(D,)``.

        A plain mean would be pulled to a class with many images.
        """
        one_hot = self.one_hot
        share = one_hot / (one_hot.sum(0).clamp_min(1) * (one_hot.sum(0) > 0).sum())
        center = share.sum(1) @ self.features
        return F.normalize(self.features - center, dim=-1), center


class Head(nn.Module, ABC):
    """Base of the heads: two learned scalars, the sharpness of the logits and the strength of the ridge.

    A subclass implements :meth:`fit_to` and :meth:`held_out_of`.

    Args:
        scale: initial factor on the logits, above 0.
        ridge: initial ridge strength for features of unit length, above 0; unused by some heads.
    """

    anchored = False
    """Whether the head knows the source classes without any support image."""

    label_noise = 0.0
    """Share of the labels that it reckons with as wrong."""

    def __init__(self, scale: float = 10.0, ridge: float = 1.0) -> None:
        super().__init__()
        refuse_outside({"head_options.scale": scale, "head_options.ridge": ridge}, 0, above=True)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))

    def fit(
        self, features: Tensor, labels: Tensor, ways: int, anchor: Anchor | None = None, ridge: Tensor | None = None
    ) -> Classifier:
        """Fit a classifier to the support; the arguments are those of :class:`Labelled`."""
        return self.fit_to(Labelled(features, labels, ways, anchor, ridge))

    def held_out(
        self, features: Tensor, labels: Tensor, ways: int, anchor: Anchor | None = None, ridge: Tensor | None = None
    ) -> Tensor:
        """Return logits ``(S, C)`` of every support image from a classifier fitted without that image."""
        return self.held_out_of(Labelled(features, labels, ways, anchor, ridge))

    def support_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss ``(S,)`` of held-out logits, which an inner loop descends."""
        return F.cross_entropy(logits, labels, reduction="none")

    def doubt(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how likely every label is wrong ``(S,)``, from held-out logits; 0 of a head that reckons with none."""
        return torch.zeros_like(logits[:, 0])

    @abstractmethod
    def fit_to(self, support: Labelled) -> Classifier:
        """Fit a classifier."""

    @abstractmethod
    def held_out_of(self, support: Labelled) -> Tensor:
        """Return logits ``(S, C)`` of every image from a classifier fitted without it."""


class _PrototypeHead(Head):
    """Class means; held out, an image is left out of its own class's mean.

    A class with one image keeps it: without it the class would have no prototype at all.
    """

    def _means(self, x: Tensor, support: Labelled) -> tuple[Tensor, Tensor]:
        """Return the class means ``(C, D)``, and for each image the mean of its class without it ``(S, D)``."""
        one_hot, labels = support.one_hot, support.labels
        counts = one_hot.sum(0)
        sums = one_hot.T @ x
        means = sums / counts.clamp_min(1)[:, None]
        several = counts[labels] > 1
        without = (sums[labels] - x) / (counts[labels] - 1).clamp_min(1)[:, None]
        return means, torch.where(several[:, None], without, means[labels])

    @staticmethod
    def _spread(features: Tensor) -> Tensor:
        # Distances in units of the support's own spread make one scale fit every backbone.
        return (features - features.mean(0)).square().sum(1).mean().clamp_min(1e-12)


@register_head("prototype")
class PrototypeHead(_PrototypeHead):
    """Squared Euclidean distance to class means, in units of the support's spread.

    Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017.
    """

    def fit_to(self, support: Labelled) -> Classifier:
        """Return the means as a linear classifier: ``-|x - c|^2 = 2 x.c - |c|^2`` up to a term that all share."""
        center = support.features.mean(0)
        means, _ = self._means(support.features - center, support)
        size = self._spread(support.features)
        weight, bias = 2 * means.T / size, -means.square().sum(1) / size
        return Classifier(weight, bias, center, self.log_scale.exp(), False)

    def held_out_of(self, support: Labelled) -> Tensor:
        """Leave every image out of its own class's mean."""
        x = support.features
        means, own = self._means(x, support)
        logits = -(x[:, None] - means).square().sum(-1)
        own_logits = -(x - own).square().sum(-1)
        logits = torch.where(support.one_hot.bool(), own_logits[:, None], logits)
        return self.log_scale.exp() * logits / self._spread(x)


@register_head("prototypical")
class PrototypicalHead(PrototypeHead):
    """Squared Euclidean distance to class means as it is, for an embedding that is trained with it.

    The head of the paper: with a factor of 1, which is learned, the logits are minus the squared distances.
    """

    def __init__(self, scale: float = 1.0, ridge: float = 1.0) -> None:
        super().__init__(scale, ridge)

    @staticmethod
    def _spread(features: Tensor) -> Tensor:
        return features.new_ones(())


@register_head("cosine")
class CosineHead(_PrototypeHead):
    """Cosine similarity to class means of centred features.

    Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018.
    """

    def fit_to(self, support: Labelled) -> Classifier:
        """Return unit-length class means as a linear classifier."""
        x, center = support.centred()
        means, _ = self._means(x, support)
        weight = F.normalize(means, dim=-1).T
        return Classifier(weight, weight.new_zeros(support.ways), center, self.log_scale.exp(), True)

    def held_out_of(self, support: Labelled) -> Tensor:
        """Leave every image out of its own class's mean."""
        x, _ = support.centred()
        means, own = self._means(x, support)
        logits = x @ F.normalize(means, dim=-1).T
        own_logits = (x * F.normalize(own, dim=-1)).sum(-1)
        return self.log_scale.exp() * torch.where(support.one_hot.bool(), own_logits[:, None], logits)


@register_head("mahalanobis")
class MahalanobisHead(_PrototypeHead):
    """Linear discriminant analysis: Mahalanobis distance to class means under one shrunk covariance.

    The covariance within classes, pooled over them, plus the ridge strength times the support's mean variance. Classes
    are equally likely a priori. With one image per class it is the prototype head. Bateni et al., "Improved Few-Shot
    Visual Classification", CVPR 2020; Shysheya et al., "FiT: Parameter Efficient Few-shot Transfer Learning for
    Personalized and Federated Image Classification", ICLR 2023.
    """

    def fit_to(self, support: Labelled) -> Classifier:
        """Return the linear classifier ``2 x.Pm - m.Pm`` with ``P`` the scaled inverse of the covariance."""
        center = support.features.mean(0)
        x = support.features - center
        means, _ = self._means(x, support)
        weight = self._times_precision(means, x - means[support.labels], support, len(x))
        return Classifier(2 * weight.T, -(means * weight).sum(1), center, self.log_scale.exp(), False)

    def held_out_of(self, support: Labelled) -> Tensor:
        """Leave every image out of its class's mean and, by a downdate of rank one, out of the covariance."""
        x = support.features
        means, own = self._means(x, support)
        deviation = x - means[support.labels]
        rest = max(len(x) - 1, 1)
        counts = support.one_hot.sum(0)[support.labels]
        lost = x.shape[1] / rest * counts / (counts - 1).clamp_min(1)
        gaps = torch.where(support.one_hot.bool()[..., None], (x - own)[:, None], x[:, None] - means)
        turned = self._times_precision(deviation, deviation, support, rest)
        distance = (gaps * self._times_precision(gaps, deviation, support, rest)).sum(-1)
        across = (gaps * turned[:, None]).sum(-1).square()
        gained = lost[:, None] * across / (1 - lost * (deviation * turned).sum(-1))[:, None]
        return -self.log_scale.exp() * (distance + gained)

    def _times_precision(self, v: Tensor, deviation: Tensor, support: Labelled, count: int) -> Tensor:
        """Return ``(D W + s I)^-1 v`` for rows ``v (..., D)``, where ``W`` is the scatter over ``count``."""
        strength = self.log_ridge.exp() * (1.0 if support.ridge is None else support.ridge)
        strength = strength * self._spread(support.features)
        gram = deviation @ deviation.T
        inner = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * strength * count / v.shape[-1]
        within = torch.linalg.solve(inner, deviation)
        return (v - (v @ deviation.T) @ within) / strength
