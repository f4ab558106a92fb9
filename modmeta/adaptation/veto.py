"""The veto: keep the unadapted prior unless the evidence says that adapting helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation.plan import Plan
from modmeta.adaptation.track_record import TrackRecord

PRIOR = "prior"

Predict = Callable[[Plan | None, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the veto chose, and why.

    Attributes:
        choice: name of the chosen candidate; ``"prior"`` means that nothing is adapted.
        gains: expected gain over the prior per candidate, in nats of loss on an unseen image.
        errors: standard error of each.
        evidence: number of support images that were predicted by a fit that had not seen them.
    """

    choice: str
    gains: dict[str, float]
    errors: dict[str, float]
    evidence: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"choice": self.choice, "gains": self.gains, "errors": self.errors, "evidence": self.evidence}


def candidates(plan: Plan, reading: list[str], learning: float = 1.0) -> dict[str, Plan]:
    """Return what the veto may choose besides the prior, cheapest first.

    Args:
        plan: the policy's plan.
        reading: units that only read statistics.
        learning: factor on all learning rates; at 0 only statistics are left.
    """
    plan = plan.scaled(learning)
    gates = plan.gate_of()
    found: dict[str, Plan] = {}
    statistics = [name for name in reading if name in gates]
    learns = len(statistics) < len(gates)
    if statistics and learns:
        found["statistics"] = plan.keeping(statistics)
    if learns and learning:
        found["plan/3"] = plan.scaled(1 / 3)
    if gates and (learning or not learns):
        found["plan"] = plan
    return found


def judge(
    plans: Mapping[str, Plan],
    labels: Tensor | None,
    anchored: bool,
    predict: Predict,
    *,
    gain: float,
    gain_deviation: float,
    held_out: Callable[[Plan | None], Tensor] | None = None,
    label_free: Collection[str] = (),
    folds: int = 2,
    caution: float = 1.0,
    record: TrackRecord | None = None,
) -> Verdict:
    """Choose among the prior and some plans by nested cross-fitting and the policy's own prediction.

    Each fold adapts on the rest of the support and predicts its own images, so no image judges a fit that saw it.
    A plan that no label moves needs no folds: it is carried out on the whole support, and only the head leaves out
    the image that it predicts, which compares the plans at the support's full size. Losses are taken at each
    candidate's best temperature: over-confidence would drown the differences.
    The policy's predicted gain is the prior of that measurement; with one image per class, where nothing can be
    left out, it decides alone. Among the plans within one standard error of the best the cheapest wins, and
    it is accepted if its gain exceeds ``caution`` standard errors.

    With a track record, measurement and forecast count as much as they have held on domains that were hidden; the plan
    stands unless another candidate is surely better, and is accepted above the record's own threshold. Where all of
    its trials knew their classes and this support's are new, or the other way round, nothing is known of the
    forecast's worth: it counts as none, and only what is measured can speak for a plan.

    Args:
        plans: candidates, cheapest first.
        labels: ``(S,)`` labels of the support; None where there are none.
        anchored: whether the head knows the classes without any support, so that a class may be left out whole.
        predict: from a plan (None: the prior), indices to adapt on and indices to predict, to logits.
        gain: the policy's predicted gain of the full plan, in nats.
        gain_deviation: standard deviation of that prediction.
        held_out: from a plan (None: the prior) to logits ``(S, C)``, each by a head that did not see the image; needed
            where ``label_free`` names plans.
        label_free: plans that move nothing by labels.
        folds: number of folds, 2 or more; 0 leaves plans that labels move to the forecast.
        caution: standard errors that a gain must exceed.
        record: how forecasts and measurements have held so far; None or an empty one takes both at their word.
    """
    if not plans:
        return Verdict(PRIOR, {}, {}, 0)
    measured = measure(plans, labels, anchored, predict, held_out=held_out, label_free=label_free, folds=folds)
    count = 0 if labels is None or not measured else len(labels)
    if record is not None and record.ready and labels is not None:
        if record.covers(anchored):
            return _by_record(plans, measured, record, gain, len(labels) / len(labels.unique()), count)
        gain = 0.0
    gains, errors = {}, {}
    for name in plans:
        # A third of the step, or only the statistics, can be expected to bring a part of the gain.
        predicted = gain if name == "plan" else 0.5 * gain
        seen = measured.get(name, torch.zeros(0, dtype=torch.double))
        if not torch.isfinite(seen).all():
            gains[name], errors[name] = -math.inf, 0.0
            continue
        # Both are estimates of this episode's gain, weighed by their precision.
        precision = 1.0 / max(gain_deviation, 1e-6) ** 2
        mean = precision * predicted
        if len(seen) > 1:
            own = len(seen) / max(float(seen.var(correction=1)), 1e-12)
            precision, mean = precision + own, mean + own * float(seen.mean())
        gains[name], errors[name] = mean / precision, precision**-0.5
    finite = {name: value for name, value in gains.items() if math.isfinite(value)}
    if not finite:
        return Verdict(PRIOR, {}, {}, count)
    best = max(finite, key=lambda name: finite[name])
    choice = next(
        name for name in finite if within_one_error(measured.get(name), measured.get(best), gains[name], gains[best])
    )
    if not gains[choice] > caution * errors[choice]:
        choice = PRIOR
    return Verdict(choice, finite, {name: errors[name] for name in finite}, count)


def measure(
    plans: Mapping[str, Plan],
    labels: Tensor | None,
    anchored: bool,
    predict: Predict,
    *,
    held_out: Callable[[Plan | None], Tensor] | None = None,
    label_free: Collection[str] = (),
    folds: int = 2,
) -> dict[str, Tensor]:
    """Return the gain over the prior of some plans per support image ``(S,)``, as far as it can be measured.

    Arguments as for :func:`judge`.
    """
    splits = [] if labels is None else stratified_folds(labels, max(folds, 2), anchored)
    if labels is None or not splits:
        return {}
    learning = {name: plan for name, plan in plans.items() if name not in label_free}
    measured = _cross_fitted(learning, labels, splits, predict) if folds else {}
    if held_out is not None:
        measured |= _left_out({name: plan for name, plan in plans.items() if name in label_free}, labels, held_out)
    return measured


def _by_record(
    plans: Mapping[str, Plan],
    measured: Mapping[str, Tensor],
    record: TrackRecord,
    forecast: float,
    shots: float,
    count: int,
) -> Verdict:
    expected = {}
    for name in plans:
        evidence = float(measured[name].mean()) if name in measured else None
        if evidence is None or math.isfinite(evidence):
            expected[name] = record.predict(name, forecast, evidence, shots)
    finite = {name: each for name, each in expected.items() if math.isfinite(each.gain)}
    gains = {name: each.gain for name, each in finite.items()}
    errors = {name: each.error for name, each in finite.items()}
    return Verdict(record.choose(finite) or PRIOR, gains, errors, count)


def _cross_fitted(
    plans: Mapping[str, Plan], labels: Tensor, splits: list[tuple[Tensor, Tensor]], predict: Predict
) -> dict[str, Tensor]:
    """Return the gain of each plan over the prior per support image ``(S,)``."""
    if not plans:
        return {}
    held = torch.cat([fold for _, fold in splits])

    def losses(plan: Plan | None) -> Tensor:
        logits = torch.cat([predict(plan, rest, fold) for rest, fold in splits])
        return tempered_losses(logits, labels[held])[held.argsort()]

    before = losses(None)
    return {name: before - losses(plan) for name, plan in plans.items()}


def _left_out(
    plans: Mapping[str, Plan], labels: Tensor, held_out: Callable[[Plan | None], Tensor]
) -> dict[str, Tensor]:
    """Return the gain of each plan over the prior per support image ``(S,)``."""
    if not plans:
        return {}
    before = tempered_losses(held_out(None), labels)
    return {name: before - tempered_losses(held_out(plan), labels) for name, plan in plans.items()}


def within_one_error(mine: Tensor | None, best: Tensor | None, gain: float, best_gain: float) -> bool:
    """Return whether a candidate is as good as the best one, up to the error of their paired difference."""
    if mine is None or best is None or len(mine) < 2:
        return gain >= best_gain
    difference = best - mine
    return float(difference.mean()) <= float(difference.std(correction=1)) / len(difference) ** 0.5


def tempered_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropies ``(N,)`` in float64 at the temperature of a fixed grid that suits the logits best.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    factors = torch.logspace(-2, 1, 31, dtype=torch.double, device=logits.device)
    scaled = factors[:, None, None] * logits.double()
    losses = F.cross_entropy(scaled.flatten(0, 1), labels.repeat(len(factors)), reduction="none").view(len(factors), -1)
    return losses[losses.mean(1).argmin()]


def stratified_folds(labels: Tensor, folds: int, anchored: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Split a support into folds, each with its share of every class.

    Args:
        labels: ``(S,)``.
        folds: number of folds; fewer where the classes have fewer images.
        anchored: whether a class with a single image may be missing from the rest.

    Returns:
        ``(indices of the rest, indices of the fold)`` pairs; empty when they would leave out a class whole.
    """
    counts = torch.bincount(labels)
    smallest = int(counts[counts > 0].min())
    if smallest < 2:
        if not anchored or len(labels) < 4:
            return []
        smallest = folds
    folds = min(folds, smallest)
    position = torch.zeros_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        position[members] = (torch.arange(len(members), device=labels.device) + label) % folds
    return [((position != fold).nonzero().flatten(), (position == fold).nonzero().flatten()) for fold in range(folds)]
