"""Bottleneck, against a plain timm model with layers added to its blocks."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modmeta.adapters import AdaptedBackbone, State

Build = Callable[..., tuple[AdaptedBackbone, State]]


class Added(nn.Module):
    """The same network as layers: 1x1 convolutions on maps, linear layers on tokens."""

    def __init__(self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, maps: bool) -> None:
        super().__init__()
        hidden, width = down.shape
        self.maps = maps
        self.down = nn.Conv2d(width, hidden, 1) if maps else nn.Linear(width, hidden)
        self.up = nn.Conv2d(hidden, width, 1) if maps else nn.Linear(hidden, width)
        for layer, weight, bias in ((self.down, down / width**0.5, down_bias), (self.up, up / hidden**0.5, up_bias)):
            layer.weight.data.copy_(weight.view_as(layer.weight))
            layer.bias.data.copy_(bias)

    def forward(self, y: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(y, dim=1 if self.maps else -1, keepdim=True)
        size = (size.square() / y.shape[1 if self.maps else -1] + 1e-6).sqrt()
        return y + size * self.up(nn.functional.gelu(self.down(y / size)))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("reduction", [1, 5])
def test_it_is_two_layers_behind_every_block(name: str, reduction: int, build: Build, images: Tensor) -> None:
    model, state = build(name, "bottleneck", reduction=reduction)
    (unit,) = model.units
    assert [site.name for site in unit.sites] == [s.name for s in model.backbone.sites if s.kind == "block"]
    plain = copy.deepcopy(model.backbone.model)
    for site in unit.sites:
        own = [state[f"{unit.name}|{site.name}|{part}"] for part in ("down", "down_bias", "up", "up_bias")]
        assert own[0].shape == (max(1, site.channels // reduction), site.channels)
        added = Added(*own, maps=name != "test_vit")
        plain.get_submodule(site.name).register_forward_hook(lambda _m, _args, y, added=added: added(y))
    with torch.no_grad():
        expected = plain(model.backbone.prepare(images))
        torch.testing.assert_close(model(images, state, {unit.name: 1.0}), expected, rtol=1e-4, atol=1e-4)
        assert float((expected - model.backbone(images)).abs().max()) > 1e-2


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(build: Build, images: Tensor) -> None:
    model, state = build("test_efficientnet", "bottleneck")
    gates = {model.units[0].name: 1.0}
    alone = torch.cat([model(image[None], state, gates) for image in images])
    torch.testing.assert_close(alone, model(images, state, gates), rtol=1e-4, atol=1e-4)


def test_pixels_without_any_signal_have_finite_gradients(build: Build) -> None:
    model, _ = build("test_resnet", "bottleneck")
    (unit,) = model.units
    module = unit.build()[unit.sites[0].name]
    y = torch.zeros(2, unit.sites[0].channels, 4, 4, requires_grad=True)
    module(y, y).sum().backward()
    assert bool(torch.isfinite(y.grad).all())
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in module.parameters())
