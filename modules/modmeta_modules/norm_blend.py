"""Statistics of the support images in place of the source's, without any gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site

_FLOOR = 1e-3
"""Added to variances: a channel that is silent on a few images must not blow up on the next one."""


@register_module("norm_blend")
class NormBlend(AdapterModule):
    """Normalisation statistics blended from the source's towards the support's; the gate is the blend.

    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS
    2020. Needs no labels and no gradient. Acts where a layer keeps running statistics (BatchNorm).

    The change of statistics is written into gamma and beta, ``gamma (x - m') / s' + beta`` being an affine map of
    ``(x - m) / s``: unlike the statistics themselves, these are differentiable, so that a policy can learn the blend.
    """

    kinds = frozenset({"norm"})
    requires = frozenset({"weight", "bias", "running_mean", "running_var"})

    shift: Tensor
    log_ratio: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("shift", torch.zeros(site.shapes["running_mean"]))
        self.register_buffer("log_ratio", torch.zeros(site.shapes["running_var"]))

    def observe(self, x: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Express the support's mean and deviation relative to the layer's own."""
        variance, mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
        deviation = (tensors["running_var"] + _FLOOR).sqrt()
        ratio = ((variance + _FLOOR).sqrt() / deviation).log()
        return {"shift": (mean - tensors["running_mean"]) / deviation, "log_ratio": ratio}

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Change gamma and beta as the observed statistics would change the layer's output."""
        gamma = tensors["weight"] * (-self.log_ratio).exp()
        return {"weight": gamma, "bias": tensors["bias"] - gamma * self.shift}
