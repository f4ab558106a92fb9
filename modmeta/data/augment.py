"""Small changes of single training images, which make the few that there are go further."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from modmeta.data.shifts.geometry import warp_each

AUGMENTED = "augmented"
"""Stands for a simulated shift in an :class:`~modmeta.data.Episode` whose images were only changed one by one."""


def deform(images: Tensor, strength: float, random: np.random.Generator) -> Tensor:
    """Turn, stretch, slant and move each image a little, each in its own way.

    Args:
        images: ``(B, C, H, W)``, uint8.
        strength: in 0..1; at 1 up to 15 degrees, 15 % of the size, a slant of 0.2, and 5 % of the side to each side.
        random: where the changes are drawn from.

    Returns:
        ``(B, C, H, W)``, uint8. What comes in from outside is the nearest border pixel.
    """
    angle, slant, left, up, wide, high = strength * random.uniform(-1, 1, (6, len(images)))
    angle, slant = angle * math.radians(15), slant * 0.2
    wide, high = 1 + 0.15 * wide, 1 + 0.15 * high
    cos, sin = np.cos(angle), np.sin(angle)
    # An image spans -1..1: 0.1 is a twentieth of its side.
    rows = [[cos * wide, slant - sin * high, 0.1 * left], [sin * wide, cos * high, 0.1 * up]]
    places = torch.from_numpy(np.array(rows, dtype=np.float32)).permute(2, 0, 1)
    return warp_each(images.float(), places).round_().to(torch.uint8)
