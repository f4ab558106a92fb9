"""FiLM: per-channel scale and shift of a normalisation layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("film")
class FiLM(AdapterModule):
    """Per-channel scale and shift of a normalisation layer's affine parameters.

    Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018; as the adapted
    parameters of a few-shot learner: Requeima et al., "CNAPs", NeurIPS 2019. The change acts on the affine
    parameters, before any activation that the layer fuses, so it merges exactly.
    """

    kinds = frozenset({"norm"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scale = nn.Parameter(torch.zeros(site.shapes["weight"]))
        if "bias" in site.shapes:
            self.shift = nn.Parameter(torch.zeros(site.shapes["bias"]))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move gamma and beta in units of the layer's typical gamma."""
        gamma = tensors["weight"]
        # Residual branches often start with gamma = 0: the floor keeps them within reach.
        size = gamma.square().mean().sqrt().clamp_min(0.1)
        changed = {"weight": gamma + size * self.scale}
        if "bias" in tensors:
            changed["bias"] = tensors["bias"] + size * self.shift
        return changed
