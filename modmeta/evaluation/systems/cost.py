"""What a backward pass costs: the one definition that all systems are charged by."""

from __future__ import annotations

from collections.abc import Iterable

from modmeta.adapters import AdaptedBackbone, Unit


def backward_macs(model: AdaptedBackbone, units: Iterable[Unit], images: int, passes: int = 1) -> int:
    """Return the multiply-accumulates of some backward passes.

    A pass goes back to the cut before the earliest unit that learns. Every layer behind that cut is charged
    twice its forward cost: once for the gradient of its input and once for that of its weight.

    Args:
        model: the backbone and its units.
        units: the units whose gates are open; those that only read statistics cost no gradient.
        images: images per pass.
        passes: number of backward passes.
    """
    learning = [unit for unit in units if unit.learns]
    return 2 * model.backbone.macs(model.cut_before(learning)) * images * passes
