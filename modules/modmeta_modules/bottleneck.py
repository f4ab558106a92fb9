"""Bottleneck: a small network on the output of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adapters import AdapterModule, Cost, register_module
from modmeta.backbone import Site
from modmeta.errors import ModmetaError

_FLOOR = 1e-6
"""Added to mean squares: after an activation, all channels of a pixel may be zero."""


@register_module("bottleneck")
class Bottleneck(AdapterModule):
    """A residual bottleneck on the output of a block: down to fewer channels, GELU, and up again.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, after each block as in Pfeiffer et
    al., "AdapterFusion", EACL 2021. On maps its two matrices are 1x1 convolutions, as in the adapters of Rebuffi et
    al., "Learning multiple visual domains with residual adapters", NeurIPS 2017. It sees every token or pixel divided
    by its root mean square over channels, and its output is multiplied by that, whatever the block's scale.

    Args:
        site: a block.
        reduction: how many times fewer channels the bottleneck has than the block, 1 or more.
    """

    kinds = frozenset({"block"})

    def __init__(self, site: Site, reduction: int = 8) -> None:
        super().__init__(site)
        if reduction < 1:
            raise ModmetaError(f"bottleneck: reduction must be 1 or more, got {reduction}")
        width, hidden = site.channels, max(1, site.channels // reduction)
        generator = torch.Generator().manual_seed(width)
        self.down = nn.Parameter(torch.randn(hidden, width, generator=generator))
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up = nn.Parameter(torch.zeros(width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bottleneck's output to ``y``, whose channels lie at the site's ``channel_dim``."""
        hidden, width = self.down.shape
        size = (y.square().mean(self.site.channel_dim, keepdim=True) + _FLOOR).sqrt()
        low = F.linear((y / size).movedim(self.site.channel_dim, -1), self.down / width**0.5, self.down_bias)
        change = F.linear(F.gelu(low), self.up / hidden**0.5, self.up_bias)
        return y + size * change.movedim(-1, self.site.channel_dim)

    def cost(self, site: Site) -> Cost:
        """Count both matrices and biases; the matrices act at every position."""
        stored = sum(parameter.numel() for parameter in self.parameters())
        return Cost(stored, macs=site.positions * (self.down.numel() + self.up.numel()))
