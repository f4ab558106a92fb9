"""Shifts of each pixel's colour: light, film and print."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from modmeta.data.shifts.draws import sign, uniform
from modmeta.data.shifts.registry import register_shift


@register_shift("brightness")
def brightness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """More light, or less."""
    return images + 0.4 * strength * sign(generator)


@register_shift("contrast")
def contrast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Values spread away from the middle, or drawn together around it."""
    factor = 1 + 3 * strength if sign(generator) > 0 else 1 - 0.85 * strength
    return 0.5 + (images - 0.5) * factor


@register_shift("gamma")
def gamma(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Another exposure: the middle tones darker, or lighter."""
    return images ** (4.0 ** (strength * sign(generator)))


@register_shift("saturation")
def saturation(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Colour fades to grey."""
    return images.lerp(F.rgb_to_grayscale(images, num_output_channels=3), strength)


@register_shift("hue")
def hue(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The colour circle turns, by half a turn at most."""
    return F.adjust_hue(images, 0.5 * strength * sign(generator))


@register_shift("color_cast")
def color_cast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Another lamp: the three channels gain or lose."""
    gains = torch.empty(3, 1, 1).uniform_(-1, 1, generator=generator)
    return images * torch.exp(1.5 * strength * gains)


@register_shift("invert")
def invert(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A negative."""
    return torch.lerp(images, 1 - images, _in_turn(strength, generator))


@register_shift("posterize")
def posterize(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Fewer levels per channel, down to two."""
    steps = 24.0 ** (1 - strength)
    return (images * steps).round() / steps


@register_shift("solarize")
def solarize(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Light parts turn dark."""
    bright = images > uniform(0.3, 0.7, generator)
    return torch.lerp(images, torch.where(bright, 1 - images, images), _in_turn(strength, generator))


def _in_turn(strength: float, generator: torch.Generator) -> Tensor:
    """Return a weight per channel, ``(3, 1, 1)``, that one after another rise from 0 to 1.

    To blend an image and its negative in all channels at once would pass through plain grey.
    """
    turn = torch.randperm(3, generator=generator).view(3, 1, 1)
    return (3 * strength - turn).clamp(0, 1)
