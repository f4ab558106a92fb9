"""Indicators of the task: how many classes and images, how hard they are to tell apart, what may be spent."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation.indicators.base import Situation, entropy, register_indicator


@register_indicator("task", ("log ways", "log mean shots", "log least shots", "evenness", "labelled"), per_unit=False)
def task(s: Situation) -> Tensor:
    """Log ways, log images per class, log images of the smallest class, evenness, and whether there are labels."""
    count = len(s.features)
    least, evenness = count / s.ways, 1.0
    if s.labels is not None and s.ways > 1:
        counts = torch.bincount(s.labels, minlength=s.ways).float()
        least = max(float(counts.min()), 0.5)  # a class without an image must not give -inf
        evenness = float(entropy(counts / count)) / math.log(s.ways)
    labelled = float(s.labels is not None)
    return s.features.new_tensor([math.log(s.ways), math.log(count / s.ways), math.log(least), evenness, labelled])


@register_indicator("resolution", ("log image size",), per_unit=False)
def resolution(s: Situation) -> Tensor:
    """Log side of the images over 224 pixels: for a policy that serves several backbones."""
    return s.features.new_tensor([math.log(s.image_size / 224)])


@register_indicator("budget", ("log budget",), per_unit=False)
def budget(s: Situation) -> Tensor:
    """Log share of the whole backward cost that may be spent, at least a hundredth."""
    return s.features.new_tensor([math.log(max(s.budget, 0.01))])


@register_indicator("difficulty", ("held-out loss",), per_unit=False)
def difficulty(s: Situation) -> Tensor:
    """Loss of the unadapted head on support images that it did not see."""
    return s.features.new_zeros(1) if s.held_out_loss is None else s.held_out_loss.reshape(1)


@register_indicator("separation", ("nearest class", "spread between"), per_unit=False)
def separation(s: Situation) -> Tensor:
    """How far apart the classes' prototypes are, in two ways; zeros without labels.

    Mean log ratio of an image's distances to the nearest other prototype and to that of its own class without it
    (to the support's mean, where it is its class's only image); and the share of the variance that lies between
    the prototypes.
    """
    if s.labels is None or len(s.labels.unique()) < 2:
        return s.features.new_zeros(2)
    one_hot = F.one_hot(s.labels, s.ways).to(s.features.dtype)
    counts = one_hot.sum(0)
    sums = one_hot.T @ s.features
    means = sums / counts.clamp_min(1)[:, None]
    others = (counts[s.labels] - 1)[:, None]
    own = torch.where(others > 0, (sums[s.labels] - s.features) / others.clamp_min(1), s.features.mean(0))
    to_own = (s.features - own).square().mean(1)
    no_other = one_hot.bool() | (counts == 0)
    to_other = (s.features[:, None] - means).square().mean(-1).masked_fill(no_other, torch.inf).amin(1)
    total = (s.features - s.features.mean(0)).square().sum()
    between = (means[s.labels] - s.features.mean(0)).square().sum()
    ratio = ((to_other + 1e-6) / (to_own + 1e-6)).log().mean()
    return torch.stack([ratio, between / total.clamp_min(1e-12)])
