"""Hosts in which every weight has an effect."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modmeta.adapters import AdaptedBackbone, State, UnitConfig
from modmeta.backbone import Backbone


@cache
def _host(name: str) -> Backbone:
    backbone = Backbone(name, pretrained=False, image_size=32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:  # no branch closed, no norm trivial
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return backbone


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build() -> Callable[..., tuple[AdaptedBackbone, State]]:
    """One unit of a module on all sites of a tiny backbone, and a state off the identity."""

    def built(name: str, module: str, **options: Any) -> tuple[AdaptedBackbone, State]:
        model = AdaptedBackbone(_host(name), [UnitConfig(module, options, group="all")])
        generator = torch.Generator().manual_seed(2)
        state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.fresh().items()}
        return model, state

    return built
