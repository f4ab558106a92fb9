"""Shifts that lose detail: optics, motion, resolution, compression."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from modmeta.data.shifts.draws import uniform
from modmeta.data.shifts.geometry import warp
from modmeta.data.shifts.registry import register_shift


def smooth(images: Tensor, sigma: float) -> Tensor:
    """Blur images ``(B, C, H, W)`` with a Gaussian of ``sigma`` pixels."""
    height, width = images.shape[-2:]
    return _gaussian(height, sigma) @ images @ _gaussian(width, sigma).T


def _gaussian(side: int, sigma: float) -> Tensor:
    # As a matrix product a wide blur costs as little as a narrow one, and needs no padding.
    places = torch.arange(side)
    weights = torch.exp(-0.5 * ((places - places.unsqueeze(1)) / sigma) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


@register_shift("gaussian_blur")
def gaussian_blur(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Out of focus."""
    return smooth(images, 0.06 * strength**0.7 * images.shape[-1])


@register_shift("motion_blur")
def motion_blur(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A camera that moved in one direction."""
    angle = uniform(0, math.pi, generator)
    reach = 0.25 * strength  # in half sides, the unit of the warp
    steps = torch.linspace(-reach, reach, 13).tolist()
    moved = (warp(images, [[1, 0, t * math.cos(angle)], [0, 1, t * math.sin(angle)]]) for t in steps)
    return sum(moved, torch.zeros_like(images)) / len(steps)


@register_shift("pixelate")
def pixelate(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Few, large pixels."""
    height, width = images.shape[-2:]
    keep = 0.2**strength
    small = [max(4, round(height * keep)), max(4, round(width * keep))]
    reduced = F.resize(images, small, InterpolationMode.BILINEAR, antialias=True)
    return F.resize(reduced, [height, width], InterpolationMode.NEAREST_EXACT)


@register_shift("jpeg")
def jpeg(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Strong compression."""
    quality = round(95 * 0.03**strength)
    return F.jpeg((images * 255).round().to(torch.uint8), quality).to(images) / 255
