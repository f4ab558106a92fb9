"""Random numbers for shift families, all from the generator that they are given."""

from __future__ import annotations

import torch


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw one number between ``low`` and ``high``."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def sign(generator: torch.Generator) -> int:
    """Draw -1 or 1."""
    return 1 if uniform(0, 1, generator) < 0.5 else -1
