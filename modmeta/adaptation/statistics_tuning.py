"""How deep and how strongly statistics are read: tried on the support, before anything learns from its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from modmeta.adaptation.plan import Plan
from modmeta.adaptation.veto import within_one_error
from modmeta.adapters import Unit
from modmeta.errors import ModmetaError, refuse_outside

Gains = dict[str, float]


def reading_units(units: Sequence[Unit]) -> list[Unit]:
    """Return the units that only read statistics, which no label moves."""
    return [unit for unit in units if unit.reads and not unit.learns]


def read_beyond(units: Sequence[Unit], depth: float) -> set[str]:
    """Return the names of the units that only read statistics and begin beyond a share of the way to the features."""
    return {unit.name for unit in reading_units(units) if unit.depth > depth}


def refuse_tuning(depths: Sequence[float], strengths: Sequence[float], who: str = "") -> None:
    """Refuse depths and strengths that cannot be tried.

    Raises:
        ModmetaError: for no depth at all, one outside 0..1, or a negative strength; ``who`` stands before its name.
    """
    if not depths:
        raise ModmetaError(f"{who}statistics_depths names no depth; [1.0] reads statistics everywhere")
    for depth in depths:
        refuse_outside({f"{who}statistics_depths": depth}, 0, 1)
    for strength in strengths:
        refuse_outside({f"{who}statistics_strengths": strength}, 0)


def tune_statistics(
    plans: Mapping[float, Plan],
    reading: Sequence[str],
    strengths: Sequence[float],
    losses: Callable[[Plan | None], Tensor],
    stands: float = 1.0,
) -> tuple[Plan, Gains, Gains]:
    """Choose how deep statistics are read, then multiply their gates, by what serves the support best.

    Reading looks at no label, so the whole support can judge it: only the head leaves out the image that it predicts.
    What gradient steps bring cannot be told from the images that they were taken on. The first depth, and then the
    factor that ``stands``, are kept unless another is better by more than one standard error of their difference.

    Args:
        plans: the policy's plans by the depth down to which they read statistics, all else the same; some.
        reading: units that only read statistics.
        strengths: factors to try, 0 for no statistics; 1 and the one that stands are tried in any case.
        losses: from a plan, or None for the unadapted model, to its loss on every support image ``(S,)`` by a head that
            has not seen it.
        stands: the factor that needs no proof: 1 is the policy's own strength, 0 no statistics.

    Returns:
        the chosen plan, and by how much every depth (none where there is but one) and every factor at the chosen depth
        lowers the unadapted model's mean loss.
    """
    own = next(iter(plans))
    alone = {depth: plan.keeping(reading) for depth, plan in plans.items()}
    if not any(plan.gate_of() for plan in alone.values()):
        return plans[own], {}, {}
    before = losses(None)

    def loss(plan: Plan) -> Tensor:
        return losses(plan if plan.gate_of() else None)

    by_depth = {depth: loss(plan) for depth, plan in alone.items()}
    depth, depth_gains = _best(by_depth, before, own)
    by_factor = {1.0: by_depth[depth]}
    if alone[depth].gate_of():
        by_factor |= {f: loss(alone[depth].strengthened(reading, f)) for f in sorted({*strengths, stands} - {1.0})}
    factor, gains = _best(by_factor, before, stands)
    return plans[depth].strengthened(reading, factor), depth_gains if len(plans) > 1 else {}, gains


def _best(found: Mapping[float, Tensor], before: Tensor, own: float) -> tuple[float, Gains]:
    """Return the key with the lowest loss, or ``own`` where it is as good up to the error, and the gain of each."""
    gains = {key: float((before - found[key]).mean()) for key in sorted(found) if found[key].isfinite().all()}
    best = max(gains, key=lambda key: gains[key], default=own)
    if own in gains and within_one_error(-found[own], -found[best], gains[own], gains[best]):
        best = own
    return best, {f"{key:g}": gain for key, gain in gains.items()}
