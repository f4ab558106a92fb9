"""Residual: a 1x1 convolution parallel to a spatial one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adapters import AdapterModule, register_module
from modmeta.backbone import Site


@register_module("residual")
class Residual(AdapterModule):
    """A 1x1 convolution in parallel to a convolution of odd kernel size, with the same stride.

    Li, Liu and Bilen, "Cross-domain Few-shot Learning with Task-specific Adapters", CVPR 2022. A parallel 1x1
    convolution is an addition to the centre tap of the kernel, so it is an overlay here: it costs nothing at
    prediction and merges exactly.
    """

    kinds = frozenset({"conv"})
    requires = frozenset({"weight"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        rows, columns, *_ = site.shapes["weight"]
        self.matrix = nn.Parameter(torch.zeros(rows, columns))

    @classmethod
    def fits(cls, site: Site) -> bool:
        """Whether the site is a dense convolution with a centre tap."""
        return super().fits(site) and site.groups == 1 and all(size % 2 for size in site.shapes["weight"][2:])

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the matrix to the centre tap, in units of what the whole kernel weighs."""
        weight = tensors["weight"]
        height, width = weight.shape[2:]
        size = (weight.square().mean() * height * width).sqrt()
        top, left = height // 2, width // 2
        return {"weight": weight + F.pad(size * self.matrix[..., None, None], (left, left, top, top))}
