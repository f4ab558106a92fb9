"""LoRA: a low-rank change of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site
from modmeta.errors import ModmetaError


@register_module("lora")
class LoRA(AdapterModule):
    """A low-rank change of a convolution's or linear layer's weight.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. The weight is read as a matrix
    ``(out, in * kernel)``, so dense, grouped and fused ``qkv`` weights are treated alike.

    Args:
        site: the place in the backbone.
        rank: rank of the change, 1 or more; lowered to the weight's own where that is smaller.
        alpha: strength of the change relative to the weight's typical size, above 0 and finite.
    """

    kinds = frozenset({"conv", "pwconv", "qkv", "proj", "mlp"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site, rank: int = 4, alpha: float = 1.0) -> None:
        super().__init__(site)
        if rank < 1:
            raise ModmetaError(f"lora: rank must be 1 or more, got {rank}")
        if not 0 < alpha < math.inf:
            raise ModmetaError(f"lora: alpha must be above 0 and finite, got {alpha}")
        self.alpha = alpha
        rows, *rest = site.shapes["weight"]
        columns = math.prod(rest)
        rank = min(rank, rows, columns)
        # A seed from the shape keeps fresh modules equal on every rank and in every process.
        generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the product of the two factors, in units of the weight's root mean square."""
        weight = tensors["weight"]
        size = weight.square().mean().sqrt() * self.alpha / math.sqrt(self.down.shape[0])
        return {"weight": weight + size * (self.up @ self.down).view_as(weight)}
