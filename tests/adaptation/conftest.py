"""A plain situation to describe."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from modmeta.adaptation import Plan
from modmeta.adapters import AdaptedBackbone, State, UnitConfig
from modmeta.backbone import Backbone


@cache
def host(name: str, dtype: torch.dtype) -> Backbone:
    backbone = Backbone(name, pretrained=False, image_size=32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if float(parameter.abs().max()) < 1e-2:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return backbone.to(dtype)


@pytest.fixture
def make() -> Callable[..., AdaptedBackbone]:
    """Build a model of units on a shared tiny backbone."""

    def build(name: str, *configs: UnitConfig, dtype: torch.dtype = torch.float32) -> AdaptedBackbone:
        return AdaptedBackbone(host(name, dtype), configs)

    return build


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def move() -> Callable[..., State]:
    """Take a state off the identity."""

    def moved(model: AdaptedBackbone, size: float = 0.1, dtype: torch.dtype = torch.float32) -> State:
        generator = torch.Generator().manual_seed(3)
        return {
            name: (tensor + size * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in model.fresh().items()
        }

    return moved


@pytest.fixture
def plan_for() -> Callable[..., Plan]:
    """Make a plan for the units of a model."""

    def plan(model: AdaptedBackbone, steps: int = 2, **changes: Any) -> Plan:
        count = len(model.units)
        tensors: dict[str, Tensor] = {
            "gates": torch.full((count,), 0.7),
            "rates": torch.full((count, steps), 0.05),
            "decay": torch.zeros(count),
            "bank": torch.ones(count, 1),
            "ridge": torch.tensor(1.0),
            "gain": torch.tensor(0.1),
            "gain_log_variance": torch.tensor(-3.0),
        }
        return Plan(tuple(unit.name for unit in model.units), **(tensors | changes))

    return plan
