"""How strongly a domain's statistics count: tried on the support itself, before anything learns from its labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from modmeta.adaptation.plan import Plan


def tune_statistics(
    plan: Plan, reading: Sequence[str], strengths: Sequence[float], loss: Callable[[Plan | None], float]
) -> tuple[Plan, dict[str, float]]:
    """Multiply the gates of units that only read statistics by what serves the support best.

    Reading looks at no label, so the whole support can judge it: only the head leaves out the image that it predicts.
    What gradient steps bring cannot be told from the images that they were taken on.

    Args:
        plan: the policy's plan.
        reading: units that only read statistics.
        strengths: factors to try, 0 for no statistics.
        loss: from a plan, or None for the unadapted model, to its loss on support images that the head has not seen.

    Returns:
        the plan with the best factor, and by how much every factor lowers the unadapted model's loss.
    """
    alone = plan.keeping(reading)
    if not alone.gate_of():
        return plan, {}
    before, gains = loss(None), {}
    for factor in strengths:
        gain = before - loss(alone.strengthened(reading, factor)) if factor else 0.0
        if math.isfinite(gain):
            gains[factor] = gain
    best = max(gains, key=lambda factor: gains[factor], default=1.0)
    return plan.strengthened(reading, best), {f"{factor:g}": gain for factor, gain in gains.items()}
