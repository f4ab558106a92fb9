"""A linear map of the features, just before the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, Cost, register_module
from modmeta.backbone import Site
from modmeta.errors import ModmetaError


@register_module("projection")
class Projection(AdapterModule):
    """A linear map of the features that starts as the identity.

    The pre-classifier adapter of Li, Liu and Bilen, "Universal Representation Learning from Multiple Domains
    for Few-shot Classification", ICCV 2021. A ``rank`` bounds its size; None is the paper's full matrix.

    Args:
        site: the backbone's features.
        rank: rank of the change, or None for a full matrix.
    """

    kinds = frozenset({"features"})

    def __init__(self, site: Site, rank: int | None = 8) -> None:
        super().__init__(site)
        width = site.channels
        if rank is not None and rank < 1:
            raise ModmetaError(f"projection: rank must be 1 or more, or null for a full matrix, got {rank}")
        self.rank = width if rank is None else min(rank, width)
        if self.rank < width:
            generator = torch.Generator().manual_seed(width)
            self.down = nn.Parameter(torch.randn(self.rank, width, generator=generator))
        self.up = nn.Parameter(torch.zeros(width, self.rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change of the features to them; ``y`` is ``(B, D)``."""
        width = self.site.channels
        low = y if self.rank == width else y @ self.down.T / width**0.5
        return y + low @ self.up.T / self.rank**0.5

    def cost(self, site: Site) -> Cost:
        """Count both factors, which are also the multiply-accumulates."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return Cost(count, macs=count)
