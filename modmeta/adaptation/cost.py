"""What a backward pass costs: the one definition that plans, budgets and all systems are charged by."""

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


def backward_shares(model: AdaptedBackbone) -> dict[str, float]:
    """Return by learning unit what a backward pass costs that goes back to it alone, 0 to 1.

    It is a share of the pass that goes back to all learning units. As a pass pays for everything behind the
    earliest unit that it reaches, the share of several units is the largest of theirs.

    Args:
        model: the backbone and its units.
    """
    whole = backward_macs(model, model.units, 1)
    return {unit.name: backward_macs(model, [unit], 1) / max(whole, 1) for unit in model.units if unit.learns}
