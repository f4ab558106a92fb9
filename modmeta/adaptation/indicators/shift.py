"""Indicators of the shift: how far the images lie from the source domains, at the features and at every norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation.indicators.base import Situation, entropy, register_indicator
from modmeta.backbone import Site


@register_indicator(
    "feature_shift",
    ("log nearest source", "log second source", "log mean source", "log spread", "log effective rank"),
    per_unit=False,
)
def feature_shift(s: Situation) -> Tensor:
    """Log distance to the nearest, the second and the mean source domain, log spread, log effective rank.

    The spread is relative to that within the sources. The effective rank of the centred features is the exponential
    of the entropy of their normalised singular values: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    nearest = s.sources.distances(s.features.mean(0), len(s.features)).sort().values
    spread = s.features.var(0, correction=0).sum() / s.sources.variance.sum()
    second = nearest[min(1, len(nearest) - 1)]
    logs = torch.stack([nearest[0] + 1e-3, second + 1e-3, nearest.mean() + 1e-3, spread + 1e-3]).log()
    # The squares are the eigenvalues of the Gram matrix, which is small where the support is.
    x = (s.features - s.features.mean(0)).double()
    values = torch.linalg.eigvalsh(x @ x.T).clamp_min(0.0).sqrt()
    return torch.cat([logs, entropy(values / values.sum().clamp_min(1e-12)).to(logs)[None]])


@register_indicator("posterior", ("likeliest source", "unknown", "entropy"), per_unit=False)
def posterior(s: Situation) -> Tensor:
    """Share of the most likely source domain, share of "unknown", and entropy of the posterior."""
    p = s.sources.posterior(s.features.mean(0), len(s.features), s.domain)
    return torch.stack([p[:-1].max(), p[-1], entropy(p) / math.log(len(p))])


@register_indicator("zero_shot", ("entropy", "margin", "loss", "accuracy", "applies"), per_unit=False)
def zero_shot(s: Situation) -> Tensor:
    """What the sources' own classifier makes of the support, and whether it applies at all.

    Its entropy, its margin (between the two likeliest classes), and with labels its loss and accuracy.
    """
    logits = _source_logits(s, s.features)
    if logits is None:
        return s.features.new_zeros(5)
    p = logits.softmax(-1)
    uncertain = entropy(p).mean() / math.log(max(s.ways, 2))
    best = p.topk(min(2, s.ways)).values
    margin = (best[:, 0] - best[:, 1:].sum(1)).mean()
    loss, hits = margin.new_zeros(()), margin.new_zeros(())
    if s.labels is not None:
        loss = F.cross_entropy(logits, s.labels)
        hits = (logits.argmax(-1) == s.labels).float().mean()
    return torch.stack([uncertain, margin, loss, hits, margin.new_ones(())])


@register_indicator("consistency", ("flip divergence", "log flip change"), per_unit=False, needs=["flipped"])
def consistency(s: Situation) -> Tensor:
    """What mirroring the images changes, which needs no labels.

    Mean divergence KL of the sources' classifier between an image and its mirror image, zero where it knows no class;
    and the log of the features' mean square change relative to their spread.
    """
    assert s.flipped is not None
    change = (s.flipped - s.features).square().mean() / s.features.var(0, correction=0).mean().clamp_min(1e-12)
    logits, mirrored = _source_logits(s, s.features), _source_logits(s, s.flipped)
    divergence = change.new_zeros(())
    if logits is not None and mirrored is not None:
        divergence = F.kl_div(mirrored.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True)
    return torch.stack([divergence, (change + 1e-3).log()])


@register_indicator("norm_shift", ("log mean source", "log nearest source"), per_unit=True)
def norm_shift(s: Situation) -> Tensor:
    """Log shift of the norm layers' inputs near each unit, to the mean source and to the nearest one."""
    if not s.norm_sites:
        return s.features.new_zeros(len(s.units), 2)
    per_site = _shift(s, s.sources.norm_mean, s.sources.norm_variance, s.sources.norm_variance.mean(0))
    by_unit = [per_site[:, near].mean(1) for near in _norms_near(s, s.norm_sites)]
    return torch.stack([torch.stack([by_source.mean(), by_source.min()]) for by_source in by_unit])


@register_indicator("norm_drift", ("log drift",), per_unit=True, needs=["running"])
def norm_drift(s: Situation) -> Tensor:
    """Log shift of the batch norms' inputs near each unit to the statistics that the backbone itself keeps.

    Those are what ``norm_blend`` starts from. Zeros on a backbone without batch norms.
    """
    assert s.running is not None
    own = [k for k, site in enumerate(s.norm_sites) if "running_mean" in site.shapes]
    if not own:
        return s.features.new_zeros(len(s.units), 1)
    mean, variance = s.running
    per_site = _shift(s, mean[None], variance[None], variance)[0, own]
    sites = [s.norm_sites[k] for k in own]
    return torch.stack([per_site[near].mean()[None] for near in _norms_near(s, sites)])


def _source_logits(s: Situation, features: Tensor) -> Tensor | None:
    """Return what the sources' own classifier says of features, or None where it knows no class."""
    if not bool(s.sources.anchor(s.classes).known.any()):
        return None
    return s.sources.classifier(s.classes)(features)


def early_shift(s: Situation, share: float = 0.2) -> float | None:
    """Return the mean shift of the first batch norms' inputs to the statistics that the backbone itself keeps.

    It is small on images like those that the backbone was trained on, whatever they show: the first layers see how
    images look. None on a backbone without batch norms, or where the situation holds none of its statistics.

    Args:
        s: the situation.
        share: of the batch norms, from the first one.
    """
    own = [k for k, site in enumerate(s.norm_sites) if "running_mean" in site.shapes]
    if s.running is None or not own:
        return None
    mean, variance = s.running
    first = own[: max(1, round(share * len(own)))]
    return float(_gaps(s, mean[None], variance[None], variance)[0, first].mean())


def _shift(s: Situation, mean: Tensor, variance: Tensor, yardstick: Tensor) -> Tensor:
    """Return the log shift ``(K, sites)`` of the support to statistics ``(K, N)``, in units of ``yardstick``."""
    return (_gaps(s, mean, variance, yardstick) + 1e-3).log()


def _gaps(s: Situation, mean: Tensor, variance: Tensor, yardstick: Tensor) -> Tensor:
    """Return the shift ``(K, sites)``, squared gaps of means and of deviations averaged over a site's channels."""
    deviation = yardstick.clamp_min(1e-6).sqrt()
    mean_gap = ((s.norm_mean - mean) / deviation).square()
    scale_gap = (s.norm_variance.sqrt() - variance.sqrt()).div(deviation).square()
    channels = [site.shapes["weight"][0] if "weight" in site.shapes else site.channels for site in s.norm_sites]
    return torch.stack([chunk.mean(1) for chunk in (mean_gap + scale_gap).split(channels, dim=1)], dim=1)


def _norms_near(s: Situation, sites: Sequence[Site]) -> list[list[int]]:
    """Return for each unit the norm sites within its stretch of the backbone, or else the nearest one."""
    found = []
    for unit in s.units:
        first, last = unit.sites[0].block, unit.sites[-1].block
        near = [k for k, site in enumerate(sites) if first <= site.block <= last]
        found.append(near or [min(range(len(sites)), key=lambda k: abs(sites[k].depth - unit.depth))])
    return found
