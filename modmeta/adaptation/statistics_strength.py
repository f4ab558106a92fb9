"""How strongly a domain's statistics count: tried on the support itself, before anything learns from its labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from modmeta.adaptation.plan import Plan
from modmeta.adaptation.veto import within_one_error


def tune_statistics(
    plan: Plan, reading: Sequence[str], strengths: Sequence[float], losses: Callable[[Plan | None], Tensor]
) -> tuple[Plan, dict[str, float]]:
    """Multiply the gates of units that only read statistics by what serves the support best.

    Reading looks at no label, so the whole support can judge it: only the head leaves out the image that it predicts.
    What gradient steps bring cannot be told from the images that they were taken on. The policy's own strength stands
    unless another is better by more than one standard error of their difference.

    Args:
        plan: the policy's plan.
        reading: units that only read statistics.
        strengths: factors to try, 0 for no statistics; 1 is tried in any case.
        losses: from a plan, or None for the unadapted model, to its loss on every support image ``(S,)`` by a head that
            has not seen it.

    Returns:
        the plan with the chosen factor, and by how much every factor lowers the unadapted model's mean loss.
    """
    alone = plan.keeping(reading)
    if not alone.gate_of():
        return plan, {}
    before = losses(None)
    found = {factor: losses(alone.strengthened(reading, factor) if factor else None) for factor in {1.0, *strengths}}
    known = [factor for factor in sorted(found) if found[factor].isfinite().all()]
    gains = {factor: float((before - found[factor]).mean()) for factor in known}
    best = max(gains, key=lambda factor: gains[factor], default=1.0)
    if 1.0 in gains and within_one_error(-found[1.0], -found[best], gains[1.0], gains[best]):
        best = 1.0
    return plan.strengthened(reading, best), {f"{factor:g}": gain for factor, gain in gains.items()}
