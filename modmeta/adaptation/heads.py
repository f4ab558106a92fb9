"""Closed-form heads: from labelled features to a classifier, in one differentiable step.

Every head has the same two verbs. ``fit`` makes a classifier of the support. ``held_out`` gives, for every
support image, logits of a classifier that did not see it, which is what an inner loop may learn from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """

    weight: Tensor
    known: Tensor
    center: Tensor

    def classifier(self, scale: Tensor, center: Tensor | None = None) -> Classifier:
        """Return the source classifier as it is, or re-centred on a new domain's mean feature."""
        bias = self.weight.new_zeros(self.weight.shape[1]).masked_fill(~self.known, -1.0)
        return Classifier(self.weight, bias, self.center if center is None else center, scale, True)


class Head(nn.Module, ABC):
    """Base of the heads: two learned scalars, the sharpness of the logits and the strength of the ridge.

    Args:
        scale: initial factor on the logits, above 0.
        ridge: initial ridge strength for features of unit length, above 0; unused by some heads.
    """

    anchored = False
    """Whether the head knows the source classes without any support image."""

    def __init__(self, scale: float = 10.0, ridge: float = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)))

    @abstractmethod
    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Classifier:
        """Fit a classifier to the support.

        Args:
            features: ``(S, D)``.
            labels: ``(S,)`` in ``0..ways-1``.
            ways: number of classes.
            anchor: the sources' classifier for these classes; unused by heads without one.
            ridge: factor on the head's ridge strength, a scalar; None is 1.
        """

    @abstractmethod
    def held_out(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``(S, C)`` of every support image from a classifier fitted without that image."""


class _PrototypeHead(Head):
    """Class means; ``held_out`` leaves the image out of its own class's mean.

    A class with one image keeps it: without it the class would have no prototype at all.
    """

    def _means(self, x: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor, Tensor]:
        one_hot = F.one_hot(labels, ways).to(x.dtype)
        counts = one_hot.sum(0)
        sums = one_hot.T @ x
        return sums / counts.clamp_min(1)[:, None], sums, counts

    def _held_out_own(self, x: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        means, sums, counts = self._means(x, labels, ways)
        several = counts[labels] > 1
        without = (sums[labels] - x) / (counts[labels] - 1).clamp_min(1)[:, None]
        return means, torch.where(several[:, None], without, means[labels])


@register_head("prototype")
class PrototypeHead(_PrototypeHead):
    """Squared Euclidean distance to class means, per feature dimension.

    Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017.
    """

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Classifier:
        """Return the means as a linear classifier: ``-|x - c|^2 = 2 x.c - |c|^2`` up to a term that all share."""
        center = features.mean(0)
        means, _, _ = self._means(features - center, labels, ways)
        size = self._spread(features)
        weight, bias = 2 * means.T / size, -means.square().sum(1) / size
        return Classifier(weight, bias, center, self.log_scale.exp(), False)

    def held_out(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Tensor:
        """Leave every image out of its own class's mean."""
        means, own = self._held_out_own(features, labels, ways)
        logits = -(features[:, None] - means).square().sum(-1)
        own_logits = -(features - own).square().sum(-1)
        logits = torch.where(F.one_hot(labels, ways).bool(), own_logits[:, None], logits)
        return self.log_scale.exp() * logits / self._spread(features)

    @staticmethod
    def _spread(features: Tensor) -> Tensor:
        # Distances in units of the support's own spread make one scale fit every backbone.
        return (features - features.mean(0)).square().sum(1).mean().clamp_min(1e-12)


@register_head("cosine")
class CosineHead(_PrototypeHead):
    """Cosine similarity to class means of centred features.

    Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018.
    """

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Classifier:
        """Return unit-length class means as a linear classifier."""
        x, center = _unit(features, labels, ways)
        means, _, _ = self._means(x, labels, ways)
        weight = F.normalize(means, dim=-1).T
        return Classifier(weight, weight.new_zeros(ways), center, self.log_scale.exp(), True)

    def held_out(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Tensor:
        """Leave every image out of its own class's mean."""
        x, _ = _unit(features, labels, ways)
        means, own = self._held_out_own(x, labels, ways)
        logits = x @ F.normalize(means, dim=-1).T
        own_logits = (x * F.normalize(own, dim=-1)).sum(-1)
        return self.log_scale.exp() * torch.where(F.one_hot(labels, ways).bool(), own_logits[:, None], logits)


@register_head("ridge")
class RidgeHead(Head):
    """Ridge regression on centred features of unit length, in the dual form.

    Bertinetto et al., "Meta-learning with differentiable closed-form solvers", ICLR 2019. Every class weighs
    the same, however many images it has. ``held_out`` is exact leave-one-out in closed form.
    """

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Classifier:
        """Solve for the weights ``W0 + X^T (X X^T + lambda N)^-1 (Y - X W0)``."""
        x, center = _unit(features, labels, ways)
        start = self._start(anchor, x.shape[1], ways, x)
        residual = _targets(labels, ways, x) - x @ start
        weight = start + x.T @ torch.linalg.solve(self._system(x, labels, ways, ridge), residual)
        return Classifier(weight, weight.new_zeros(ways), center, self.log_scale.exp(), True)

    def held_out(
        self,
        features: Tensor,
        labels: Tensor,
        ways: int,
        anchor: Anchor | None = None,
        ridge: Tensor | None = None,
    ) -> Tensor:
        """Return ``Y - e`` with ``e_i = [G R]_i / G_ii`` and ``G`` the inverse of the dual system."""
        x, _ = _unit(features, labels, ways)
        targets = _targets(labels, ways, x)
        residual = targets - x @ self._start(anchor, x.shape[1], ways, x)
        inverse = torch.linalg.inv(self._system(x, labels, ways, ridge))
        errors = (inverse @ residual) / inverse.diagonal()[:, None]
        return self.log_scale.exp() * (targets - errors)

    def _start(self, anchor: Anchor | None, width: int, ways: int, like: Tensor) -> Tensor:
        return like.new_zeros(width, ways)

    def _system(self, x: Tensor, labels: Tensor, ways: int, ridge: Tensor | None) -> Tensor:
        strength = self.log_ridge.exp() * (1.0 if ridge is None else ridge)
        counts = F.one_hot(labels, ways).sum(0).to(x.dtype)
        # An image of a class with many others counts for less: its own lambda is larger.
        balance = counts[labels] * (counts > 0).sum() / counts.sum()
        return x @ x.T + torch.diag(strength * balance)


@register_head("anchored_ridge")
class AnchoredRidgeHead(RidgeHead):
    """Ridge regression on what the source domains' own classifier leaves unexplained.

    For classes that the sources share it starts from their classifier and corrects it by the support; for new
    classes it is plain ridge. With few images this is the bar that any adaptation has to pass.
    """

    anchored = True

    def _start(self, anchor: Anchor | None, width: int, ways: int, like: Tensor) -> Tensor:
        return like.new_zeros(width, ways) if anchor is None else anchor.weight


def _unit(features: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Centre on the mean of the class means, so that a large class does not pull the centre to itself."""
    one_hot = F.one_hot(labels, ways).to(features.dtype)
    share = one_hot / (one_hot.sum(0).clamp_min(1) * (one_hot.sum(0) > 0).sum())
    center = share.sum(1) @ features
    return F.normalize(features - center, dim=-1), center


def _targets(labels: Tensor, ways: int, like: Tensor) -> Tensor:
    return F.one_hot(labels, ways).to(like.dtype) - 1.0 / ways
