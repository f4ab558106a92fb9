"""Bias: only the additive parameters of layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("bias")
class Bias(AdapterModule):
    """A shift of every bias.

    Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning", ACL 2022; for convolutional networks under a
    memory budget: Cai et al., "TinyTL: Reduce Memory, Not Parameters", NeurIPS 2020.
    """

    kinds = frozenset({"norm", "conv", "dwconv", "pwconv", "qkv", "proj", "mlp"})
    requires = frozenset({"weight", "bias"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(torch.zeros(site.shapes["bias"]))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the shift in units of the layer's typical output for inputs of unit variance."""
        weight = tensors["weight"]
        fan_in = weight.numel() // weight.shape[0]
        size = (weight.square().mean() * fan_in).sqrt().clamp_min(0.1)
        return {"bias": tensors["bias"] + size * self.shift}
