"""Scale: factors on depthwise kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("scale")
class Scale(AdapterModule):
    """One factor per channel of a depthwise convolution, or one per tap of its kernel.

    Depthwise kernels hold few weights and decide what a channel sees, where low-rank changes would be larger than
    the layer itself. Factors on filters: Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019.

    Args:
        site: the place in the backbone.
        per_tap: one factor per weight of the kernel instead of one per channel.
    """

    kinds = frozenset({"dwconv"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site, per_tap: bool = False) -> None:
        super().__init__(site)
        channels, *rest = site.shapes["weight"]
        self.log_factor = nn.Parameter(torch.zeros(channels, *(rest if per_tap else [1] * len(rest))))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply the kernel; factors stay positive."""
        return {"weight": tensors["weight"] * self.log_factor.exp()}
