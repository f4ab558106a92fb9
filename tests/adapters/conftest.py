"""Tiny backbones with units that every weight of has an effect, one per kind of normalisation."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from modmeta.adapters import AdaptedBackbone, State, UnitConfig
from modmeta.backbone import Backbone

NORMS = ("test_efficientnet", "test_efficientnet_gn", "test_convnext")  # batch, group and layer normalisation


@cache
def host(name: str) -> Backbone:
    """Return a backbone with no branch closed and with source statistics that are not 0 and 1."""
    backbone = Backbone(name, pretrained=False, image_size=32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if float(parameter.abs().max()) < 1e-2:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        for buffer_name, buffer in backbone.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            if buffer_name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return backbone


@pytest.fixture
def make() -> Callable[..., AdaptedBackbone]:
    """Build a model of units on a shared tiny backbone, which must stay as it is."""

    def build(name: str, *configs: UnitConfig) -> AdaptedBackbone:
        return AdaptedBackbone(host(name), configs)

    return build


@pytest.fixture(autouse=True)
def _hosts_untouched() -> Iterator[None]:
    before = {name: host(name).fingerprint() for name in NORMS}
    yield
    assert {name: host(name).fingerprint() for name in NORMS} == before


@pytest.fixture
def all_modules() -> Callable[[str], list[UnitConfig]]:
    """A module of every way to act, as far as the backbone has sites for it; the last one is a slot."""

    def configs(name: str) -> list[UnitConfig]:
        blend = [UnitConfig("norm_blend")] if name in ("test_efficientnet", "test_resnet") else []
        prompt = [UnitConfig("prompt", {"length": 2})] if name == "test_vit" else []
        slots = [UnitConfig("bottleneck"), *prompt, UnitConfig("projection", {"rank": 4})]
        return [*blend, UnitConfig("film"), UnitConfig("lora", {"rank": 2}), *slots]

    return configs


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def move() -> Callable[..., State]:
    """Take a state off the identity, at all tensors or at those of some units."""

    def moved(model: AdaptedBackbone, units: Sequence[str] | None = None, size: float = 0.1, seed: int = 0) -> State:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + size * torch.randn(tensor.shape, generator=generator)
            if units is None or name.partition("|")[0] in units
            else tensor
            for name, tensor in model.fresh().items()
        }

    return moved
