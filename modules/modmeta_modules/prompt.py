"""Prompt: learned tokens beside those of the image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, Cost, Layer, register_module
from modmeta.backbone import Site
from modmeta.errors import ModmetaError


@register_module("prompt")
class Prompt(AdapterModule):
    """Learned tokens that a transformer block sees beside those of the image.

    Jia et al., "Visual Prompt Tuning", ECCV 2022. The output moves from the block's plain one towards that with the
    prompt by a learned ``strength``: at 0 it is the identity, at 1 exactly the paper's method. Branches that start
    at zero: Bachlechner et al., "ReZero is All You Need", UAI 2021; before prompts: Zhang et al., "LLaMA-Adapter",
    ICLR 2024. Acts on blocks that take any number of tokens; windows and relative positions rule it out.

    The strength is not scaled down: it is one number among many, and the size of a step is taken over all of them.

    Args:
        site: a block.
        length: number of tokens, 1 or more.
        deep: tokens of its own for each block (the paper's VPT-deep). Else those of the unit's first block travel
            through all of its blocks (VPT-shallow); choose ``group: all``.
    """

    kinds = frozenset({"block"})

    def __init__(self, site: Site, length: int = 8, deep: bool = True) -> None:
        super().__init__(site)
        if length < 1:
            raise ModmetaError(f"prompt: length must be 1 or more, got {length}")
        self.length, self.deep = length, deep
        self.before: str | None = None  # the site whose tokens arrive here, if not its own ones
        generator = torch.Generator().manual_seed(site.order)
        self.tokens = nn.Parameter(torch.randn(length, site.channels, generator=generator))
        self.strength = nn.Parameter(torch.zeros(()))

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the site is a block of tokens that takes any number of them."""
        return super().fits(site) and site.any_length

    @classmethod
    def build(cls, sites: Sequence[Site], **options: Any) -> dict[str, Self]:
        """Return one module per block; shallow, only the first keeps tokens of its own."""
        modules = super().build(sites, **options)
        for one, other in pairwise(modules.values()):
            if not other.deep:
                other.before = one.site.name
                del other.tokens
        return modules

    def rerun(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        """Run the block on ``x`` ``(B, N, C)`` with the tokens appended, and go towards what comes of it."""
        count = x.shape[1]
        tokens = self.tokens.expand(x.shape[0], -1, -1) if self.before is None else self._arriving(layer)
        prompted = layer.run(torch.cat([x, tokens], dim=1))
        layer.carried[self.site.name] = prompted[:, count:]
        return y + self.strength * (prompted[:, :count] - y)

    def _arriving(self, layer: Layer) -> Tensor:
        if self.before not in layer.carried:
            raise ModmetaError(
                f"prompt: no tokens reach {self.site.name!r}, as the pass began behind {self.before!r}; start before it"
            )
        return layer.carried[self.before]

    def cost(self, site: Site) -> Cost:
        """Count the tokens and the strength, and the block's layers once more, on the tokens too."""
        stored = sum(parameter.numel() for parameter in self.parameters())
        return Cost(stored, macs=site.macs * (site.positions + self.length) // site.positions)
