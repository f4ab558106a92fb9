"""Shifts by a noisy sensor. Each image gets its own grain, of the same kind and strength.

The grain is drawn in one go, so that an image's grain does not depend on how many images follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modmeta.data.shifts.registry import register_shift


@register_shift("gaussian_noise")
def gaussian_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Grain that is added."""
    return images + 0.4 * strength * torch.randn(images.shape, generator=generator)


@register_shift("speckle_noise")
def speckle_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Grain that grows with the light."""
    return images * (1 + 0.7 * strength * torch.randn(images.shape, generator=generator))


@register_shift("impulse_noise")
def impulse_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Dead pixels, black or white."""
    draw = torch.rand((images.shape[0], 1, *images.shape[2:]), generator=generator)
    share = 0.35 * strength / 2
    return images.masked_fill(draw < share, 0).masked_fill(draw > 1 - share, 1)
