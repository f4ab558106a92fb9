"""Shifts of the viewpoint."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnF
from torch import Tensor

from modmeta.data.shifts.draws import sign, uniform
from modmeta.data.shifts.registry import register_shift


def warp(images: Tensor, matrix: list[list[float]]) -> Tensor:
    """Resample images ``(B, C, H, W)`` at affinely moved places, the same ones for all.

    Args:
        images: float images.
        matrix: 2 x 3, see :func:`warp_each`.
    """
    return warp_each(images, torch.tensor([matrix], dtype=images.dtype))


def warp_each(images: Tensor, places: Tensor) -> Tensor:
    """Resample images ``(B, C, H, W)`` at affinely moved places.

    Args:
        images: float images.
        places: ``(B, 2, 3)``, or ``(1, 2, 3)`` for all, from places in the result to places in ``images``; an image
            spans -1..1. What lies outside is the nearest border pixel, so that no shift is given away by a black rim.
    """
    grid = nnF.affine_grid(places, [len(places), *images.shape[1:]], align_corners=False)
    grid = grid.expand(len(images), -1, -1, -1)
    return nnF.grid_sample(images, grid, padding_mode="border", align_corners=False)


@register_shift("rotation")
def rotation(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A camera held askew, by 35 degrees at most."""
    angle = math.radians(35) * strength * sign(generator)
    cos, sin = math.cos(angle), math.sin(angle)
    return warp(images, [[cos, -sin, 0], [sin, cos, 0]])


@register_shift("shear")
def shear(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Slanted sideways."""
    return warp(images, [[1, 0.7 * strength * sign(generator), 0], [0, 1, 0]])


@register_shift("zoom")
def zoom(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Seen from further away, a little off the centre."""
    scale = 1 + 0.8 * strength
    left, up = (uniform(-0.3, 0.3, generator) * strength for _ in range(2))
    return warp(images, [[scale, 0, left], [0, scale, up]])
