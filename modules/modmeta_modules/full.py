"""Full: every weight and bias of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("full")
class Full(AdapterModule):
    """A free change of every weight and bias of a layer: what fine-tuning and MAML adapt.

    Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017.

    Args:
        site: the layer.
        scaled: whether changes are in units of the weight's size; if not, a gradient step on the change is one on
            the weight itself.
    """

    kinds = frozenset({"norm", "conv", "dwconv", "pwconv", "qkv", "proj", "mlp"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site, scaled: bool = True) -> None:
        super().__init__(site)
        self.scaled = scaled
        self.weight = nn.Parameter(torch.zeros(site.shapes["weight"]))
        if "bias" in site.shapes:
            self.bias = nn.Parameter(torch.zeros(site.shapes["bias"]))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the changes, the weight's in units of its size, the bias's in units of the layer's typical output."""
        if not self.scaled:
            return {name: tensors[name] + change for name, change in self.named_parameters()}
        weight = tensors["weight"]
        size = weight.square().mean().sqrt().clamp_min(1e-3)
        changed = {"weight": weight + size * self.weight}
        if "bias" in tensors:
            fan_in = weight.numel() // weight.shape[0]
            changed["bias"] = tensors["bias"] + size * fan_in**0.5 * self.bias
        return changed
