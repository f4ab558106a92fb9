"""What an indicator is, and what it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from modmeta.adaptation.sources import SourceView
from modmeta.adapters import Unit
from modmeta.backbone import Site
from modmeta.registry import Registry

Need = Literal["gradients", "noise", "groups", "flipped", "running"]
"""A part of a :class:`Situation` that costs something, and is there only if an indicator asks for it.

``gradients`` costs a backward pass through all learning units, ``noise`` another one, ``flipped`` a forward pass;
``groups`` makes gradients finer than halves, ``running`` is a look at the backbone's own statistics.
"""


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
        gradients: per learning unit what ``G`` groups of images contribute to its gradient, ``(G, P)``; empty when
            no indicator asks for them, or there are no labels.
        units: the units to describe.
        distances: ``(K,)`` distances to the domains of the bank's visible specialists; None without any.
        noise: as ``gradients``, under permuted labels.
        flipped: features of the images mirrored left to right; None when no indicator asks for them.
        running: ``(N,)`` mean and variance that the backbone's batch norms keep themselves, NaN at other norms;
            None when no indicator asks for them.
        shares: by learning unit, the share of the whole backward cost that is paid if it is the earliest to learn.
        budget: largest share of that cost that the adaptation may take.
        image_size: height and width of the images in pixels.
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
    noise: Mapping[str, Tensor] = field(default_factory=dict)
    flipped: Tensor | None = None
    running: tuple[Tensor, Tensor] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    budget: float = 1.0
    image_size: int = 224


@dataclass(frozen=True)
class Indicator:
    """A registered indicator.

    Attributes:
        compute: the function.
        numbers: what each of its numbers is (per unit), in a few words.
        per_unit: whether it returns a row per unit.
        needs: the costly parts of the situation that it reads.
    """

    compute: Callable[[Situation], Tensor]
    numbers: tuple[str, ...]
    per_unit: bool
    needs: frozenset[Need]

    @property
    def width(self) -> int:
        """How many numbers it returns (per unit)."""
        return len(self.numbers)


INDICATORS: Registry[Indicator] = Registry("indicator")


def register_indicator(
    name: str, numbers: Sequence[str], *, per_unit: bool, needs: Sequence[Need] = ()
) -> Callable[[Callable[[Situation], Tensor]], Callable[[Situation], Tensor]]:
    """Register a function of a :class:`Situation` as the indicator ``name``.

    Args:
        name: what configurations call it.
        numbers: what each number is that it returns, for tables and cards.
        per_unit: whether it returns a row per unit, ``(U, width)``, or ``(width,)`` for the whole domain.
        needs: the costly parts of the situation that it reads.
    """

    def add(compute: Callable[[Situation], Tensor]) -> Callable[[Situation], Tensor]:
        INDICATORS.register(name)(Indicator(compute, tuple(numbers), per_unit, frozenset(needs)))
        return compute

    return add


def entropy(p: Tensor) -> Tensor:
    """Return the entropies of distributions along the last axis, in nats."""
    return -(p * p.clamp_min(1e-9).log()).sum(-1)
