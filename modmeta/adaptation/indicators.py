"""Domain indicators: the numbers that describe a new domain, globally and per unit.

An indicator is a registered function of a :class:`Situation`. Global ones return ``(width,)``, those per unit
``(U, width)``; widths never depend on the number of units, domains or classes, so a policy fits any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modmeta.adaptation.sources import SourceView
from modmeta.adapters import Unit
from modmeta.backbone import KINDS, Site
from modmeta.registry import Registry


@dataclass(frozen=True)
class Situation:
    """All that is known of a support set before anything adapts to it.

    Attributes:
        features: ``(S, D)`` under the unadapted backbone.
        labels: ``(S,)``, or None for an unlabelled support.
        ways: number of classes.
        classes: their names.
        domain: an explicit domain label, or None.
        norm_mean: ``(N,)`` mean input per channel of every norm site; ``norm_variance`` likewise.
        norm_sites: the norm sites that these are of.
        sources: the visible source domains.
        held_out_loss: mean loss of the unadapted head on support images that it did not see, or None.
        gradients: per learning unit two gradients ``(2, P)``, from two halves of the support; empty when no
            indicator asks for them.
        units: the units to describe.
        distances: ``(K,)`` distances to the domains of the bank's visible specialists; None without any.
    """

    features: Tensor
    labels: Tensor | None
    ways: int
    classes: tuple[str, ...]
    domain: str | None
    norm_mean: Tensor
    norm_variance: Tensor
    norm_sites: Sequence[Site]
    sources: SourceView
    held_out_loss: Tensor | None
    gradients: Mapping[str, Tensor]
    units: Sequence[Unit]
    distances: Tensor | None = None


@dataclass(frozen=True)
class Indicator:
    """A registered indicator.

    Attributes:
        compute: the function.
        per_unit: whether it returns a row per unit.
        width: numbers that it returns (per unit).
        needs_gradients: whether it reads ``Situation.gradients``, which cost a backward pass.
    """

    compute: Callable[[Situation], Tensor]
    per_unit: bool
    width: int
    needs_gradients: bool = False


INDICATORS: Registry[Indicator] = Registry("indicator")


def register_indicator(
    name: str, *, per_unit: bool, width: int = 1, needs_gradients: bool = False
) -> Callable[[Callable[[Situation], Tensor]], Callable[[Situation], Tensor]]:
    """Register a function of a :class:`Situation` as the indicator ``name``."""

    def add(compute: Callable[[Situation], Tensor]) -> Callable[[Situation], Tensor]:
        INDICATORS.register(name)(Indicator(compute, per_unit, width, needs_gradients))
        return compute

    return add


@register_indicator("task", per_unit=False, width=4)
def task(s: Situation) -> Tensor:
    """Log ways, log images per class, evenness of the classes, and whether there are labels."""
    count = len(s.features)
    evenness = 1.0
    if s.labels is not None and s.ways > 1:
        share = torch.bincount(s.labels, minlength=s.ways).float() / count
        evenness = float(-(share * share.clamp_min(1e-9).log()).sum() / math.log(s.ways))
    labelled = float(s.labels is not None)
    return s.features.new_tensor([math.log(s.ways), math.log(count / s.ways), evenness, labelled])


@register_indicator("feature_shift", per_unit=False, width=3)
def feature_shift(s: Situation) -> Tensor:
    """Log distance to the nearest and the mean source domain, and log ratio of the spread."""
    distance = s.sources.distances(s.features.mean(0), len(s.features))
    spread = s.features.var(0, correction=0).sum() / s.sources.variance.sum()
    return torch.stack([distance.min() + 1e-3, distance.mean() + 1e-3, spread + 1e-3]).log()


@register_indicator("posterior", per_unit=False, width=3)
def posterior(s: Situation) -> Tensor:
    """Share of the most likely source domain, share of "unknown", and entropy of the posterior."""
    p = s.sources.posterior(s.features.mean(0), len(s.features), s.domain)
    entropy = -(p * p.clamp_min(1e-9).log()).sum() / math.log(len(p))
    return torch.stack([p[:-1].max(), p[-1], entropy])


@register_indicator("zero_shot", per_unit=False, width=4)
def zero_shot(s: Situation) -> Tensor:
    """Entropy, loss and accuracy of the sources' own classifier on the support, and whether it applies at all."""
    known = s.sources.anchor(s.classes).known
    if not bool(known.any()):
        return s.features.new_zeros(4)
    logits = s.sources.classifier(s.classes)(s.features)
    p = logits.softmax(-1)
    entropy = -(p * p.clamp_min(1e-9).log()).sum(-1).mean() / math.log(max(s.ways, 2))
    if s.labels is None:
        return torch.stack([entropy, entropy.new_zeros(()), entropy.new_zeros(()), entropy.new_ones(())])
    loss = nn.functional.cross_entropy(logits, s.labels)
    hits = (logits.argmax(-1) == s.labels).float().mean()
    return torch.stack([entropy, loss, hits, entropy.new_ones(())])


@register_indicator("difficulty", per_unit=False, width=1)
def difficulty(s: Situation) -> Tensor:
    """Loss of the unadapted head on support images that it did not see."""
    return s.features.new_zeros(1) if s.held_out_loss is None else s.held_out_loss.reshape(1)


@register_indicator("norm_shift", per_unit=True, width=2)
def norm_shift(s: Situation) -> Tensor:
    """Log shift of the norm layers' inputs near each unit, to the mean source and to the nearest one."""
    if not s.norm_sites:
        return s.features.new_zeros(len(s.units), 2)
    deviation = s.sources.norm_variance.mean(0).clamp_min(1e-6).sqrt()
    mean_gap = ((s.norm_mean - s.sources.norm_mean) / deviation).square()
    scale_gap = (s.norm_variance.sqrt() - s.sources.norm_variance.sqrt()).div(deviation).square()
    channels = [site.shapes["weight"][0] if "weight" in site.shapes else site.channels for site in s.norm_sites]
    per_site = torch.stack([chunk.mean(1) for chunk in (mean_gap + scale_gap).split(channels, dim=1)], dim=1)
    log = (per_site + 1e-3).log()
    by_unit = [log[:, near].mean(1) for near in _norms_near(s)]
    return torch.stack([torch.stack([by_source.mean(), by_source.min()]) for by_source in by_unit])


def _norms_near(s: Situation) -> list[list[int]]:
    """Return for each unit the norm sites within its stretch of the backbone, or else the nearest one."""
    found = []
    for unit in s.units:
        first, last = unit.sites[0].block, unit.sites[-1].block
        near = [k for k, site in enumerate(s.norm_sites) if first <= site.block <= last]
        found.append(near or [min(range(len(s.norm_sites)), key=lambda k: abs(s.norm_sites[k].depth - unit.depth))])
    return found


@register_indicator("gradient", per_unit=True, width=2, needs_gradients=True)
def gradient(s: Situation) -> Tensor:
    """Log size of each unit's gradient, and how far the two halves of the support agree on its direction."""
    rows = []
    for unit in s.units:
        halves = s.gradients.get(unit.name)
        if halves is None:
            rows.append(s.features.new_zeros(2))
            continue
        size = halves.mean(0).square().mean().sqrt()
        agreement = nn.functional.cosine_similarity(halves[0], halves[1], dim=0)
        rows.append(torch.stack([(size + 1e-6).log(), agreement]))
    return torch.stack(rows)


@register_indicator("place", per_unit=True, width=4 + len(KINDS))
def place(s: Situation) -> Tensor:
    """What and where the unit is: depth, log size, whether it learns or reads, and the kinds it acts on."""
    rows = []
    for unit in s.units:
        kinds = {site.kind for site in unit.sites}
        row = [unit.depth, math.log(1 + unit.cost.parameters), float(unit.learns), float(unit.reads)]
        rows.append(row + [float(kind in kinds) for kind in KINDS])
    return s.features.new_tensor(rows)


DEFAULT_INDICATORS = (
    "task",
    "feature_shift",
    "posterior",
    "zero_shot",
    "difficulty",
    "norm_shift",
    "gradient",
    "place",
)


class IndicatorSet(nn.Module):
    """A chosen set of indicators, standardised by statistics that are saved with the policy.

    Args:
        names: registered indicators.
    """

    center_global: Tensor
    scale_global: Tensor
    center_unit: Tensor
    scale_unit: Tensor

    def __init__(self, names: Sequence[str] = DEFAULT_INDICATORS) -> None:
        super().__init__()
        self.names = tuple(names)
        chosen = [INDICATORS.get(name) for name in self.names]
        self.global_width = sum(i.width for i in chosen if not i.per_unit)
        self.unit_width = sum(i.width for i in chosen if i.per_unit)
        self.needs_gradients = any(i.needs_gradients for i in chosen)
        for part, width in (("global", self.global_width), ("unit", self.unit_width)):
            self.register_buffer(f"center_{part}", torch.zeros(width))
            self.register_buffer(f"scale_{part}", torch.ones(width))

    def raw(self, situation: Situation) -> tuple[Tensor, Tensor]:
        """Return global ``(G,)`` and per-unit ``(U, F)`` indicators as they are."""
        chosen = [INDICATORS.get(name) for name in self.names]
        whole = [i.compute(situation) for i in chosen if not i.per_unit]
        each = [i.compute(situation) for i in chosen if i.per_unit]
        units = len(situation.units)
        return (
            torch.cat([situation.features.new_zeros(0), *whole]).detach(),
            torch.cat([situation.features.new_zeros(units, 0), *each], dim=1).detach(),
        )

    def fit(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set the statistics from raw indicators of a sample of episodes."""
        whole = torch.stack([row[0] for row in rows])
        each = torch.cat([row[1] for row in rows])
        for part, values in (("global", whole), ("unit", each)):
            getattr(self, f"center_{part}").copy_(values.mean(0))
            deviation = values.std(0, correction=0)
            # A number that never varied would blow up on the first domain where it does.
            getattr(self, f"scale_{part}").copy_(torch.where(deviation > 1e-4, deviation, torch.ones_like(deviation)))

    def forward(self, situation: Situation) -> tuple[Tensor, Tensor]:
        """Return standardised indicators, clipped to three standard deviations."""
        whole, each = self.raw(situation)
        whole = (whole - self.center_global) / self.scale_global
        each = (each - self.center_unit) / self.scale_unit
        return whole.clamp(-3.0, 3.0), each.clamp(-3.0, 3.0)
