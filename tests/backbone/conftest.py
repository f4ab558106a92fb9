"""Small backbones that the tests of this package share."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from modmeta.backbone import Backbone

SMALL = ("test_resnet", "test_efficientnet", "test_vit", "test_convnext")


@torch.no_grad()
def _alive(name: str, image_size: int) -> Backbone:
    """Return a backbone with random weights of which each has an effect.

    Fresh timm models multiply residual branches by zero, and nothing inside them would matter.
    """
    backbone = Backbone(name, pretrained=False, image_size=image_size)
    generator = torch.Generator().manual_seed(2)
    for parameter in backbone.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    return backbone


@cache
def _built(name: str) -> Backbone:
    return _alive(name, 32)


@pytest.fixture
def build() -> Callable[[str, int], Backbone]:
    """Backbones of one's own, by name and image size."""
    return _alive


@pytest.fixture
def get() -> Callable[[str], Backbone]:
    """Backbones at 32 pixels, built once; every test must leave them as they are."""
    return _built


@pytest.fixture(params=SMALL)
def backbone(request: pytest.FixtureRequest) -> Iterator[Backbone]:
    host = _built(request.param)
    before = host.fingerprint()
    yield host
    assert host.fingerprint() == before
    assert not host.model.training


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def change() -> Callable[..., dict[str, Tensor]]:
    """Overlays that change every tensor of the sites of some kinds."""

    def changed(
        backbone: Backbone,
        kinds: tuple[str, ...] = ("norm", "conv", "dwconv", "pwconv", "qkv"),
        seed: int = 0,
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = backbone.tensors()
        return {
            f"{site.name}.{local}": tensors[f"{site.name}.{local}"] + 0.1 * torch.rand(shape, generator=generator)
            for site in backbone.sites
            if site.kind in kinds
            for local, shape in site.shapes.items()
        }

    return changed
