"""The registry of shift families and the one way to apply them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from modmeta.errors import ModmetaError
from modmeta.registry import Registry

Shift = Callable[[Tensor, float, torch.Generator], Tensor]

SHIFTS: Registry[Shift] = Registry("shift")


def register_shift(name: str, *, override: bool = False) -> Callable[[Shift], Shift]:
    """Register a shift family.

    The family is a function ``fn(images, strength, generator)``: images ``(B, 3, H, W)``, float in
    0..1, strength in 0..1, and it returns images of the same shape. What it draws from the generator
    to describe the shift (an angle, a colour) it draws once for all images, so that an episode sees
    one domain. Lengths should be fractions of the image's side. Strength 0 is taken care of here, as
    is clipping to 0..1.
    """

    def add(family: Shift) -> Shift:
        @wraps(family)
        def shift(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
            if not 0 <= strength <= 1:
                raise ModmetaError(f"shift {name!r} got strength {strength}; it must lie in 0..1")
            return family(images, strength, generator).clamp(0, 1) if strength > 0 else images

        return SHIFTS.register(name, override=override)(shift)

    return add


def apply_shift(name: str, images: Tensor, strength: float, seed: int) -> Tensor:
    """Send images through a simulated shift.

    Args:
        name: a registered family.
        images: ``(B, 3, H, W)``, uint8.
        strength: 0 (the images as they are) to 1.
        seed: fixes everything that the family draws.

    Returns:
        ``(B, 3, H, W)``, uint8.

    Raises:
        ModmetaError: if the family is unknown or the strength outside 0..1.
    """
    generator = torch.Generator().manual_seed(seed)
    shifted = SHIFTS.get(name)(images.float().div_(255), strength, generator)
    return shifted.mul(255).round_().to(torch.uint8)
