"""Indicators of each unit: what the support's gradients say of it, and where and what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation.indicators.base import Situation, register_indicator
from modmeta.backbone import KINDS


@register_indicator("gradient", ("log size", "agreement"), per_unit=True, needs=["gradients"])
def gradient(s: Situation) -> Tensor:
    """Log size of each unit's gradient, and how far the two halves of the support agree on its direction."""

    def describe(parts: Tensor) -> list[Tensor]:
        agreement = F.cosine_similarity(parts[0::2].sum(0), parts[1::2].sum(0), dim=0)
        return [_log_size(parts), agreement]

    return _rows(s, s.gradients, 2, lambda name: describe(s.gradients[name]))


@register_indicator("noise_floor", ("log size over noise",), per_unit=True, needs=["gradients", "noise"])
def noise_floor(s: Situation) -> Tensor:
    """Log size of each unit's gradient relative to its size under permuted labels.

    A gradient that is as large for labels that mean nothing says nothing of the domain.
    """
    return _rows(s, s.gradients, 1, lambda name: [_log_size(s.gradients[name]) - _log_size(s.noise[name])])


@register_indicator("signal", ("log Fisher", "log GSNR"), per_unit=True, needs=["gradients", "groups"])
def signal(s: Situation) -> Tensor:
    """Log trace of the Fisher information per parameter, and log ratio of signal to noise of the gradient.

    Both are of one image's gradient. The variance between groups of ``n`` images is an ``n``-th of that between
    images. Ratio of the squared mean to the variance: Liu et al., "Understanding Why Neural Networks Generalize Well
    Through GSNR of Parameters", ICLR 2020; here of a whole unit.
    """

    def describe(parts: Tensor) -> list[Tensor]:
        groups, images = len(parts), len(s.features)
        mean = parts.sum(0)
        # The groups' means, of which the unit's gradient is the mean.
        variance = (groups * parts).var(0, correction=1).mean() * images / groups
        power = mean.square().mean()
        return [(power + variance + 1e-12).log(), (power + 1e-12).log() - (variance + 1e-12).log()]

    return _rows(s, s.gradients, 2, lambda name: describe(s.gradients[name]))


@register_indicator("place", ("depth", "log parameters", "backward share", "learns", "reads", *KINDS), per_unit=True)
def place(s: Situation) -> Tensor:
    """What and where the unit is.

    Its depth, log size, the backward cost if it is the earliest to learn, whether it learns or reads, and the
    kinds it acts on.
    """
    rows = []
    for unit in s.units:
        kinds = {site.kind for site in unit.sites}
        share = s.shares.get(unit.name, 0.0)
        row = [unit.depth, math.log(1 + unit.cost.parameters), share, float(unit.learns), float(unit.reads)]
        rows.append(row + [float(kind in kinds) for kind in KINDS])
    return s.features.new_tensor(rows)


def _log_size(parts: Tensor) -> Tensor:
    return (parts.sum(0).square().mean().sqrt() + 1e-6).log()


def _rows(s: Situation, gradients: Mapping[str, Tensor], width: int, describe: Callable[[str], list[Tensor]]) -> Tensor:
    """Return ``(U, width)``: zeros for the units that have no gradient."""
    zeros = s.features.new_zeros(width)
    return torch.stack([torch.stack(describe(u.name)) if u.name in gradients else zeros for u in s.units])
