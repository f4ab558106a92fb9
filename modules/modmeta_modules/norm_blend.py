"""Statistics of the support images in place of the source's, without any gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site, channel_moments

_FLOOR = 1e-3
"""Added to variances: a channel that is silent on a few images must not blow up on the next one."""


@register_module("norm_blend")
class NormBlend(AdapterModule):
    """Normalisation statistics blended from the source's towards the support's; the gate is the blend.

    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS
    2020. Needs no labels and no gradient. Acts where a layer keeps running statistics (BatchNorm).
    """

    kinds = frozenset({"norm"})
    requires = frozenset({"running_mean", "running_var"})

    shift: Tensor
    log_ratio: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("shift", torch.zeros(site.shapes["running_mean"]))
        self.register_buffer("log_ratio", torch.zeros(site.shapes["running_var"]))

    def observe(self, x: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Express the support's mean and variance relative to the layer's own."""
        mean, variance = channel_moments(x)
        own = tensors["running_var"] + _FLOOR
        return {"shift": (mean - tensors["running_mean"]) / own.sqrt(), "log_ratio": ((variance + _FLOOR) / own).log()}

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replace the running statistics by the observed ones."""
        mean, variance = tensors["running_mean"], tensors["running_var"]
        return {
            "running_mean": mean + (variance + _FLOOR).sqrt() * self.shift,
            "running_var": variance * self.log_ratio.exp(),
        }
