"""IA3: factors on keys, values and hidden units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("ia3")
class IA3(AdapterModule):
    """Factors on the keys and values of attention and on the hidden units of transformer MLPs.

    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
    2022. Keys and values are scaled by the rows of a fused ``qkv`` weight, queries left as they are; hidden units
    by the columns of the MLP's second layer. Both merge exactly. A bias of the values that timm keeps beside the
    layer (BEiT, EVA, SwinV2) stays as it is.
    """

    kinds = frozenset({"qkv", "mlp"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        rows, columns = site.shapes["weight"]
        self.log_factor = nn.Parameter(torch.zeros(2 * rows // 3 if site.kind == "qkv" else columns))

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the site is a fused ``qkv`` layer, or the layer of an MLP that reads its hidden units."""
        if not super().fits(site) or len(site.shapes["weight"]) != 2:
            return False
        rows, columns = site.shapes["weight"]
        return rows == 3 * columns if site.kind == "qkv" else rows < columns

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale rows (and their biases) of ``qkv``, or columns of the MLP's second layer."""
        weight, factor = tensors["weight"], self.log_factor.exp()
        if self.site.kind == "mlp":
            return {"weight": weight * factor}
        factor = torch.cat([factor.new_ones(len(weight) - len(factor)), factor])
        changed = {"weight": weight * factor[:, None]}
        if "bias" in tensors:
            changed["bias"] = tensors["bias"] * factor
        return changed
