"""A chosen set of indicators, standardised: what the policy sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modmeta.adaptation.indicators.base import INDICATORS, Need, Situation
from modmeta.errors import ModmetaError

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
        dropout: probability that a number is left out, in training.
        noise: standard deviation of what is added to each standardised number, in training.
    """

    center_global: Tensor
    scale_global: Tensor
    center_unit: Tensor
    scale_unit: Tensor

    def __init__(self, names: Sequence[str] = DEFAULT_INDICATORS, dropout: float = 0.0, noise: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0 or not 0.0 <= noise < math.inf:
            raise ModmetaError(
                f"indicator_dropout must lie in 0..1 and indicator_noise must not be negative, got {dropout}, {noise}"
            )
        self.names = tuple(names)
        self.dropout = dropout
        self.noise = noise
        chosen = [INDICATORS.get(name) for name in self.names]
        self.global_width = sum(i.width for i in chosen if not i.per_unit)
        self.unit_width = sum(i.width for i in chosen if i.per_unit)
        self.needs: frozenset[Need] = frozenset().union(*(i.needs for i in chosen))
        for part, width in (("global", self.global_width), ("unit", self.unit_width)):
            self.register_buffer(f"center_{part}", torch.zeros(width))
            self.register_buffer(f"scale_{part}", torch.ones(width))

    @property
    def backward_passes(self) -> int:
        """Number of backward passes through all learning units that it asks for, where there are labels."""
        return len(self.needs & {"gradients", "noise"})

    def numbers(self, per_unit: bool) -> list[tuple[str, str]]:
        """Return the indicator and the meaning of every number, in order."""
        chosen = [(name, INDICATORS.get(name)) for name in self.names]
        return [(name, number) for name, i in chosen if i.per_unit == per_unit for number in i.numbers]

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

    def standardise(self, whole: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw indicators ``(..., G)`` and ``(..., F)`` as the policy sees them, on their own device."""
        own = {name: buffer.to(whole.device) for name, buffer in self.named_buffers()}
        whole = ((whole - own["center_global"]) / own["scale_global"]).clamp(-3.0, 3.0)
        each = ((each - own["center_unit"]) / own["scale_unit"]).clamp(-3.0, 3.0)
        return whole, each

    def forward(self, situation: Situation, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return standardised indicators, clipped to three standard deviations.

        Args:
            situation: what they are computed from.
            generator: source of dropout and noise while training; None leaves the numbers alone.
        """
        whole, each = self.standardise(*self.raw(situation))
        if generator is None or not self.training:
            return whole, each
        return self._blur(whole, generator), self._blur(each, generator)

    def _blur(self, x: Tensor, generator: torch.Generator) -> Tensor:
        # Zero is the mean over domains: a number that is left out says nothing. Nothing is rescaled, as at
        # evaluation all numbers are there at the same size. Where it is switched off no number is drawn.
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator).to(x)
        if self.dropout:
            kept = torch.rand(x.shape[-1], generator=generator) >= self.dropout
            x = x * kept.to(x)
        return x
