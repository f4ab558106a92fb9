"""Stretch: one factor per filter of a convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("stretch")
class Stretch(AdapterModule):
    """One factor per filter of a spatial or pointwise convolution, and per row of a linear layer.

    Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019.
    """

    kinds = frozenset({"conv", "pwconv", "mlp", "proj"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        filters, *rest = site.shapes["weight"]
        self.log_factor = nn.Parameter(torch.zeros(filters, *[1] * len(rest)))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply the filters; factors stay positive."""
        return {"weight": tensors["weight"] * self.log_factor.exp()}
