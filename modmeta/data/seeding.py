"""Random numbers that depend on what they are for, not on what was drawn before."""

from __future__ import annotations

import zlib

import numpy as np


def rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator of one purpose, such as ``rng(seed, "test", domain, 7)``.

    Equal arguments give equal streams, on any machine, in any process and in any order.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))
